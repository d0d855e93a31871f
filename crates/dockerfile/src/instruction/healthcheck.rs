//! HEALTHCHECK.

use oci::Healthcheck;

use super::InstructionError;
use super::duration::parse_duration;
use super::flags::{FlagKind, Flags};
use super::parse::command_words;
use crate::parser::Node;
use crate::{raw, text};

const NANOSECONDS_PER_MILLISECOND: i64 = 1_000_000;

pub(super) fn parse(node: &Node) -> Result<Healthcheck, InstructionError> {
    let Some((kind, args)) = node.args.split_first() else {
        return Err(InstructionError::AtLeastOneArgument("HEALTHCHECK"));
    };
    let kind = raw::shown(kind.to_uppercase());
    if kind == "NONE" {
        if !args.is_empty() {
            return Err(InstructionError::HealthcheckNone);
        }
        return Ok(Healthcheck {
            test: vec![kind],
            ..Healthcheck::default()
        });
    }
    let names = ["interval", "timeout", "start-period", "start-interval", "retries"];
    let flags = Flags::parse(&node.flags, &names.map(|name| (name, FlagKind::Text)))?;
    if kind != "CMD" {
        return Err(InstructionError::HealthcheckKind(kind));
    }
    let mut command = command_words(args.to_vec(), node.json);
    if command.is_empty() {
        return Err(InstructionError::HealthcheckCommand);
    }
    command.insert(
        0,
        if node.json {
            "CMD".into()
        } else {
            "CMD-SHELL".into()
        },
    );
    let interval = |name| interval(name, flags.get(name).unwrap_or_default());
    Ok(Healthcheck {
        test: command,
        interval: interval("interval")?,
        timeout: interval("timeout")?,
        start_period: interval("start-period")?,
        start_interval: interval("start-interval")?,
        retries: retries(flags.get("retries").unwrap_or_default())?,
    })
}

fn interval(name: &'static str, value: &str) -> Result<i64, InstructionError> {
    if value.is_empty() {
        return Ok(0);
    }
    let ns = parse_duration(value).map_err(InstructionError::Number)?;
    if ns != 0 && ns < NANOSECONDS_PER_MILLISECOND {
        return Err(InstructionError::ShortInterval(name));
    }
    Ok(ns)
}

fn retries(value: &str) -> Result<i64, InstructionError> {
    if value.is_empty() {
        return Ok(0);
    }
    let count = text::parse_int(value).map_err(InstructionError::Number)?;
    if i32::try_from(count).is_err() {
        return Err(InstructionError::Number(text::int_error("ParseInt", value, true)));
    }
    if count < 0 {
        return Err(InstructionError::NegativeRetries(count));
    }
    Ok(count)
}
