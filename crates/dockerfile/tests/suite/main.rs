//! Tests of the frontend from the outside.

mod drive;
mod golden;
mod hostile;
