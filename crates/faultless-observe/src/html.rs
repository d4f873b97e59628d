//! The report as a page.
use crate::Report;
/// The page.
pub fn page(_: &Report) -> String {
    String::new()
}
