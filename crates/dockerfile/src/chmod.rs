//! The value of `--chmod`.

/// Permissions as they go into a file operation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Chmod {
    Bits(i32),
    /// Symbolic, e.g. `u=rwX,go=rX`.
    Symbolic(String),
}

/// Why a mode is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ChmodError {
    #[error("invalid chmod parameter: '{0}'. it should be octal string and between 0 and 07777")]
    NotOctal(String),
    #[error("invalid syntax")]
    Syntax,
}

/// Parses an octal number up to 07777, or a symbolic mode.
pub(crate) fn parse_chmod(text: &str) -> Result<Chmod, ChmodError> {
    let not_octal = || ChmodError::NotOctal(text.to_owned());
    let number = if text.starts_with('+') {
        None
    } else {
        u32::from_str_radix(text, 8).ok()
    };
    if let Some(bits) = number {
        return match i32::try_from(bits) {
            Ok(bits) if bits <= 0o7777 => Ok(Chmod::Bits(bits)),
            _ => Err(not_octal()),
        };
    }
    if text.starts_with(|c: char| c.is_ascii_digit()) {
        return Err(not_octal());
    }
    if text.split(',').all(is_clause) {
        return Ok(Chmod::Symbolic(text.to_owned()));
    }
    Err(ChmodError::Syntax)
}

/// Tells whether a clause is who, then at least one operator, each with permissions.
fn is_clause(clause: &str) -> bool {
    let actions = clause.trim_start_matches(['a', 'u', 'g', 'o']);
    actions.starts_with(['+', '-', '=']) && actions.chars().all(|c| "+-=rstwXxugo".contains(c))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_modes() {
        assert_eq!(parse_chmod("0755"), Ok(Chmod::Bits(0o755)));
        for symbolic in ["u=rwX,go=rX", "+x", "a-w", "u+s=g"] {
            assert_eq!(parse_chmod(symbolic), Ok(Chmod::Symbolic(symbolic.into())));
        }
        for bad in ["10000", "999", "0x1"] {
            assert_eq!(parse_chmod(bad), Err(ChmodError::NotOctal(bad.into())));
        }
        for bad in ["u", "rwx", "u=q", "u=r,"] {
            assert_eq!(parse_chmod(bad), Err(ChmodError::Syntax), "{bad}");
        }
    }
}
