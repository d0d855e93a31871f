//! Text formats that scripts parse: Go's spelling of tables, sizes, times, templates and JSON.

pub mod csv;
pub mod table;
pub mod template;
pub mod time;
pub mod units;
pub mod value;
