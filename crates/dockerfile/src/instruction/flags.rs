//! Flags of instructions.

use super::InstructionError;
use crate::suggest;

/// What a flag's value is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum FlagKind {
    Bool,
    Text,
    /// May be given several times.
    Texts,
}

/// The flags of one instruction, parsed.
#[derive(Debug, Default)]
pub(super) struct Flags<'a> {
    values: Vec<(&'a str, &'a str)>,
}

impl<'a> Flags<'a> {
    /// Checks the words against the known flags.
    pub(super) fn parse(
        words: &'a [String],
        known: &[(&'static str, FlagKind)],
    ) -> Result<Self, InstructionError> {
        let mut flags = Self::default();
        for word in words {
            if word == "--" {
                break;
            }
            let Some(body) = word.strip_prefix("--") else {
                return Err(InstructionError::FlagStart(word.clone()));
            };
            let (name, value) = body
                .split_once('=')
                .map_or((body, None), |(name, value)| (name, Some(value)));
            let shown = || format!("--{name}");
            let Some((_, kind)) = known.iter().find(|(known, _)| *known == name) else {
                let error = InstructionError::UnknownFlag(shown());
                return Err(error.suggest(suggest::search(
                    name,
                    known.iter().map(|(known, _)| known),
                    false,
                )));
            };
            if *kind != FlagKind::Texts && flags.get(name).is_some() {
                return Err(InstructionError::DuplicateFlag(shown()));
            }
            let value = match (kind, value) {
                (FlagKind::Bool, None) => "true",
                (FlagKind::Bool, Some(value)) => match value.to_lowercase().as_str() {
                    "" => return Err(InstructionError::FlagValue(shown())),
                    "true" => "true",
                    "false" => "false",
                    _ => {
                        return Err(InstructionError::FlagBool {
                            flag: shown(),
                            value: value.to_owned(),
                        });
                    }
                },
                (_, None) => return Err(InstructionError::FlagValue(shown())),
                (_, Some(value)) => value,
            };
            flags.values.push((name, value));
        }
        Ok(flags)
    }

    pub(super) fn get(&self, name: &str) -> Option<&'a str> {
        self.values
            .iter()
            .find(|(have, _)| *have == name)
            .map(|(_, value)| *value)
    }

    /// The value, or nothing as empty text.
    pub(super) fn text(&self, name: &str) -> String {
        self.get(name).unwrap_or_default().to_owned()
    }

    pub(super) fn texts(&self, name: &str) -> Vec<String> {
        self.values
            .iter()
            .filter(|(have, _)| *have == name)
            .map(|(_, value)| (*value).to_owned())
            .collect()
    }

    pub(super) fn bool(&self, name: &str) -> Option<bool> {
        self.get(name).map(|value| value == "true")
    }
}
