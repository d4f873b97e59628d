//! What the engine tells its program beside errors.

use crate::base::error::Error;
use std::fmt;
use std::sync::Arc;

/// What [`PoolBuilder::on_event`](crate::PoolBuilder::on_event) is told.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event {
    /// The pool's backend is not [`Backend::Full`](crate::Backend::Full). The text says which one it is, and what it lacks.
    Degraded(String),
    /// A plain load of a map failed. The thread gets SIGBUS after the call has returned, or after a second.
    LoadFailed(Error),
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Event::Degraded(backend) => write!(f, "backend {backend}"),
            Event::LoadFailed(error) => write!(f, "a load failed: {error}"),
        }
    }
}

/// What is called with events.
#[derive(Clone)]
pub(crate) struct Hook(pub(crate) Arc<dyn Fn(&Event) + Send + Sync>);

impl fmt::Debug for Hook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Hook")
    }
}
