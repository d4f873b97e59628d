//! The observer of a build that has no BPF programs: it can say why, and nothing else.

use crate::{Options, Report};
use anyhow::bail;
use faultless_trace::{Event, Header, Nanos};
use std::convert::Infallible;
use std::process::{Child, Command};
use std::time::Duration;

/// Takes each event as it comes.
pub type Sink = Box<dyn FnMut(&Event) -> anyhow::Result<()>>;

/// Cannot be had in this build.
#[derive(Debug)]
pub struct Observer(Infallible);

impl Observer {
    /// Says why this build cannot watch.
    ///
    /// # Errors
    ///
    /// Always.
    pub fn start(_: &Options) -> anyhow::Result<Observer> {
        bail!(
            "observe cannot watch a live process: {}",
            crate::why_not().unwrap_or("it was not built in")
        )
    }

    /// Never called.
    pub fn missing(&self) -> &[String] {
        match self.0 {}
    }

    /// Never called.
    ///
    /// # Errors
    ///
    /// None.
    pub fn watch(&mut self, _: u32) -> anyhow::Result<()> {
        match self.0 {}
    }

    /// Never called.
    ///
    /// # Errors
    ///
    /// None.
    pub fn spawn(&mut self, _: &mut Command) -> anyhow::Result<Child> {
        match self.0 {}
    }

    /// Never called.
    pub fn record(&mut self, _: Sink) {
        match self.0 {}
    }

    /// Never called.
    pub fn header(&self, _: &[u32], _: &[String]) -> Header {
        match self.0 {}
    }

    /// Never called.
    pub fn tick(&mut self, _: Duration) {
        match self.0 {}
    }

    /// Never called.
    pub fn failure(&mut self) -> Option<anyhow::Error> {
        match self.0 {}
    }

    /// Never called.
    pub fn is_anyone_there(&self) -> bool {
        match self.0 {}
    }

    /// Never called.
    pub fn elapsed(&self) -> Nanos {
        match self.0 {}
    }

    /// Never called.
    pub fn report(&self, _: Option<Duration>) -> Report {
        match self.0 {}
    }

    /// Never called.
    pub fn going_on(&mut self) -> Vec<String> {
        match self.0 {}
    }

    /// Never called.
    pub fn finish(&mut self) -> Report {
        match self.0 {}
    }
}
