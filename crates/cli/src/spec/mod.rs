//! Parsers of the specifications that flags hold: `type=local,dest=out`, `id=token,src=file`, `default=/run/agent`.

mod attest;
mod cache;
mod limits;
mod opt;
mod output;
mod policy;
mod secret;
mod ssh;
mod tls;

pub use attest::attestation;
pub use cache::{CacheEntry, cache_export, cache_import};
pub use limits::{memory_bytes, ulimit};
pub use opt::{allow, attributes, build_opts};
pub use output::{Destination, Output, buildctl_output, buildx_output};
pub use policy::source_policy;
pub use secret::{SecretOrigin, secrets};
pub use ssh::{AgentSpec, agents};
pub use tls::{AuthTls, auth_tls};

use crate::format::csv::CsvError;

/// Why a flag's value cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// The value is not a list of comma separated fields.
    #[error("{context}{source}")]
    Csv {
        /// What was being read, with `: `; may be empty.
        context: &'static str,
        /// Why.
        source: CsvError,
    },
    /// The value breaks the flag's own rules.
    #[error("{message}")]
    Invalid {
        /// The text.
        message: String,
    },
    /// A file that the value names cannot be used.
    #[error("{context}: {source}")]
    File {
        /// What was done, with the path.
        context: String,
        /// Why.
        source: std::io::Error,
    },
}

impl From<CsvError> for SpecError {
    fn from(source: CsvError) -> Self {
        Self::Csv { context: "", source }
    }
}

impl SpecError {
    pub(crate) fn invalid(message: impl Into<String>) -> Self {
        Self::Invalid {
            message: message.into(),
        }
    }
}

/// Parses a boolean as Go's `strconv.ParseBool`.
///
/// # Errors
/// Go's text for anything else.
pub fn go_bool(text: &str) -> Result<bool, SpecError> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
        _ => Err(SpecError::invalid(format!(
            "strconv.ParseBool: parsing \"{text}\": invalid syntax"
        ))),
    }
}

/// Splits each field at its first `=` and lowers the key.
fn key_values(text: &str) -> Result<Vec<(String, String)>, SpecError> {
    let fields = crate::format::csv::fields(text)?;
    fields
        .into_iter()
        .map(|field| match field.split_once('=') {
            Some((key, value)) => Ok((key.to_lowercase(), value.to_owned())),
            None => Err(SpecError::invalid(format!("invalid value {field}"))),
        })
        .collect()
}
