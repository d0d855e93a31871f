//! Instructions that change the image's configuration or the variables, not its files; and WORKDIR.

use oci::Healthcheck;
use serde_json::{Map, Value};

use llb::{Chown, Constraints, FileActions, MkdirOptions};

use super::dispatch::Step;
use super::name::shown;
use super::stages::{StageId, StageState};
use super::{Converter, NON_ENV_ARGS, validate, wire_ranges};
use crate::error::{ConvertError, Progress};
use crate::instruction::{Argument, CommandLine, KeyValue, split_port};
use crate::lint::rules;
use crate::os_path;
use crate::outline::ArgSeen;
use crate::signal;
use crate::text;
use crate::word::Variables;

/// What a port counts for in the image.
const PORT_BYTES: usize = 128;

impl Converter<'_> {
    fn expand_pairs(&self, step: &Step<'_>, pairs: &[KeyValue]) -> Progress<Vec<KeyValue>> {
        let pairs = pairs.iter().map(|pair| {
            Ok(KeyValue {
                key: self.expand(step, &pair.key)?,
                value: self.expand(step, &pair.value)?,
                legacy: pair.legacy,
            })
        });
        pairs.collect()
    }

    fn warn_legacy(step: &Step<'_>, pair: &KeyValue) {
        if pair.legacy {
            let message = || rules::legacy_key_value_format(&step.instruction.name);
            step.linter.run(
                &rules::LEGACY_KEY_VALUE_FORMAT,
                &step.instruction.location,
                message,
            );
        }
    }

    pub(super) fn env(&mut self, step: &Step<'_>, pairs: &[KeyValue]) -> Progress<()> {
        let pairs = self.expand_pairs(step, pairs)?;
        let mut message = "ENV".to_owned();
        for pair in &pairs {
            Self::warn_legacy(step, pair);
            validate::secret_name("ENV", &pair.key, &step.instruction.location, &step.linter);
            message.push_str(&format!(" {}={}", pair.key, pair.value));
            let stage = &mut self.stages[step.id.0];
            stage.env.set(&pair.key, &pair.value);
            stage.set_image_env(&pair.key, &pair.value);
        }
        self.commit(step.id, message, false);
        Ok(())
    }

    pub(super) fn label(&mut self, step: &Step<'_>, pairs: &[KeyValue]) -> Progress<()> {
        let pairs = self.expand_pairs(step, pairs)?;
        let mut message = "LABEL".to_owned();
        for pair in pairs {
            Self::warn_legacy(step, &pair);
            message.push_str(&format!(" {}={}", pair.key, pair.value));
            self.stages[step.id.0]
                .image
                .config
                .labels
                .insert(pair.key, pair.value);
        }
        self.commit(step.id, message, false);
        Ok(())
    }

    pub(super) fn arg(&mut self, step: &Step<'_>, args: &[Argument]) -> Progress<()> {
        let mut shown = Vec::with_capacity(args.len());
        for arg in args {
            validate::secret_name("ARG", &arg.key, &step.instruction.location, &step.linter);
            let given = self.build_args.get(&arg.key);
            let inherited = self.global_args.get(&arg.key);
            let is_inherited = given.is_none() && arg.value.is_none() && inherited.is_some();
            let value = match (given, &arg.value) {
                (Some(given), _) => Some(given.clone()),
                (None, Some(default)) => Some(self.expand(step, default)?),
                (None, None) => inherited.map(str::to_owned),
            };
            let mut seen = ArgSeen::new(arg, &step.instruction.location);
            let stage = &mut self.stages[step.id.0];
            if let Some(value) = &value {
                if !NON_ENV_ARGS.contains(&arg.key.as_str()) {
                    stage.env.set(&arg.key, value);
                }
                seen.value.clone_from(value);
            }
            if !is_inherited {
                stage.outline.all_args.insert(arg.key.clone(), seen);
            }
            stage.outline.used_args.insert(arg.key.clone());
            shown.push(
                value
                    .as_ref()
                    .map_or_else(|| arg.key.clone(), |value| format!("{}={value}", arg.key)),
            );
            stage.arg_names.insert(arg.key.clone());
            stage.build_args.push(Argument { value, ..arg.clone() });
        }
        self.commit(step.id, format!("ARG {}", shown.join(" ")), false);
        Ok(())
    }

    /// Warns if an instruction replaces an earlier one of the same kind.
    fn warn_replaced(step: &Step<'_>, before: &mut Option<Vec<crate::position::Range>>) {
        if let Some(location) = before {
            let message = || rules::multiple_instructions_disallowed(&step.instruction.name);
            step.linter
                .run(&rules::MULTIPLE_INSTRUCTIONS_DISALLOWED, location, message);
        }
        *before = Some(step.instruction.location.clone());
    }

    /// Returns the words of a command, with the shell in front if it needs one.
    fn words_of(step: &Step<'_>, line: &CommandLine, stage: &StageState) -> Vec<String> {
        if !line.prepend_shell {
            return line.args.clone();
        }
        if stage.image.config.shell.is_empty() {
            let message = || rules::json_args_recommended(&step.instruction.name);
            step.linter
                .run(&rules::JSON_ARGS_RECOMMENDED, &step.instruction.location, message);
        }
        with_shell(stage, &line.args)
    }

    pub(super) fn cmd(&mut self, step: &Step<'_>, line: &CommandLine) {
        let stage = &mut self.stages[step.id.0];
        Self::warn_replaced(step, &mut stage.cmd_at);
        let words = Self::words_of(step, line, stage);
        let message = format!("CMD {}", text::quote_list(&words));
        stage.image.config.cmd = words;
        stage.image.config.args_escaped = true;
        self.commit(step.id, message, false);
    }

    pub(super) fn entrypoint(&mut self, step: &Step<'_>, line: &CommandLine) {
        let stage = &mut self.stages[step.id.0];
        Self::warn_replaced(step, &mut stage.entrypoint_at);
        let words = Self::words_of(step, line, stage);
        let message = format!("ENTRYPOINT {}", text::quote_list(&words));
        stage.image.config.entrypoint = words;
        if stage.cmd_at.is_none() {
            stage.image.config.cmd.clear();
        }
        self.commit(step.id, message, false);
    }

    pub(super) fn healthcheck(&mut self, step: &Step<'_>, check: &Healthcheck) {
        let stage = &mut self.stages[step.id.0];
        Self::warn_replaced(step, &mut stage.healthcheck_at);
        stage.image.config.healthcheck = Some(check.clone());
        let message = format!(
            "HEALTHCHECK {{Test:{} Interval:{} Timeout:{} StartPeriod:{} StartInterval:{} Retries:{}}}",
            text::list(&check.test),
            duration_text(check.interval),
            duration_text(check.timeout),
            duration_text(check.start_period),
            duration_text(check.start_interval),
            check.retries
        );
        self.commit(step.id, message, false);
    }

    pub(super) fn expose(&mut self, step: &Step<'_>, ports: &[String]) -> Progress<()> {
        let mut exposed = Vec::new();
        for written in ports {
            for word in self.lexer.words(written, &self.stages[step.id.0].env)? {
                let port = split_port(&word)?;
                let location = &step.instruction.location;
                if port.odd_casing {
                    step.linter.run(&rules::EXPOSE_PROTO_CASING, location, || {
                        rules::expose_proto_casing(&word)
                    });
                }
                if port.has_host() {
                    step.linter.run(&rules::EXPOSE_INVALID_FORMAT, location, || {
                        rules::expose_invalid_format(&word)
                    });
                }
                let ports = port.exposed()?;
                self.spend(PORT_BYTES * ports.len())?;
                exposed.extend(ports);
            }
        }
        let message = format!("EXPOSE {}", text::list(&exposed));
        let known = &mut self.stages[step.id.0].image.config.exposed_ports;
        known.extend(exposed.into_iter().map(|port| (port, Value::Object(Map::new()))));
        self.commit(step.id, message, false);
        Ok(())
    }

    pub(super) fn volume(&mut self, step: &Step<'_>, volumes: &[String]) -> Progress<()> {
        let volumes = volumes
            .iter()
            .map(|volume| self.expand(step, volume))
            .collect::<Progress<Vec<_>>>()?;
        let known = &mut self.stages[step.id.0].image.config.volumes;
        for volume in &volumes {
            if volume.is_empty() {
                return Err(ConvertError::EmptyVolume.into());
            }
            known.insert(volume.clone(), Value::Object(Map::new()));
        }
        self.commit(step.id, format!("VOLUME {}", text::list(&volumes)), false);
        Ok(())
    }

    pub(super) fn stop_signal(&mut self, step: &Step<'_>, signal: &str) -> Progress<()> {
        let signal = self.expand(step, signal)?;
        if !signal::is_signal(&signal) {
            return Err(ConvertError::Signal(signal).into());
        }
        let message = format!("STOPSIGNAL {signal}");
        self.stages[step.id.0].image.config.stop_signal = signal;
        self.commit(step.id, message, false);
        Ok(())
    }

    pub(super) fn workdir(&mut self, step: &Step<'_>, dir: &str) -> Progress<()> {
        let id = step.id;
        let dir = self.expand(step, dir)?;
        let stage = &mut self.stages[id.0];
        let platform = stage.platform.clone().unwrap_or_default();
        if !stage.workdir_set && !os_path::is_absolute(&dir, &platform.os) {
            let message = || rules::workdir_relative_path(&dir);
            step.linter
                .run(&rules::WORKDIR_RELATIVE_PATH, &step.instruction.location, message);
        }
        stage.workdir_set = true;
        let dir = self.change_dir(id, &dir)?;
        let has_layer = dir != "/";
        if has_layer {
            self.make_dir(step, id, &dir);
        }
        self.commit(id, format!("WORKDIR {dir}"), has_layer);
        Ok(())
    }

    fn make_dir(&mut self, step: &Step<'_>, id: StageId, dir: &str) {
        let stage = &self.stages[id.0];
        let user = &stage.image.config.user;
        let options = MkdirOptions {
            make_parents: true,
            chown: (!user.is_empty()).then(|| Chown::parse(user)),
            created_ns: self.epoch.map(|epoch| epoch.nanoseconds()),
        };
        let text = shown(&self.lexer, &step.instruction.code, &stage.env);
        let platform = stage.platform.clone().unwrap_or_default();
        let name = self.instruction_name(id, &text, Some(&platform));
        let constraints = Constraints::new()
            .custom_name(name)
            .location(self.source_map, wire_ranges(&step.instruction.location))
            .platform(&platform);
        let stage = &mut self.stages[id.0];
        stage.state = stage
            .state
            .file(FileActions::new().mkdir(dir, 0o755, options), &constraints);
    }
}

/// Puts the shell in front of a command.
pub(super) fn with_shell(stage: &StageState, args: &[String]) -> Vec<String> {
    let mut words = stage.image.config.shell.clone();
    if words.is_empty() {
        let default: &[&str] = if stage.image.os == "windows" {
            &["cmd", "/S", "/C"]
        } else {
            &["/bin/sh", "-c"]
        };
        words.extend(default.iter().map(|word| (*word).to_owned()));
    }
    words.push(args.join(" "));
    words
}

/// Prints a duration as Go does: `1h0m5s`, `1.5s`, `2ms`.
fn duration_text(nanoseconds: i64) -> String {
    const SECOND: u64 = 1_000_000_000;
    let sign = if nanoseconds < 0 { "-" } else { "" };
    let total = nanoseconds.unsigned_abs();
    if total == 0 {
        return "0s".to_owned();
    }
    if total < SECOND {
        let (unit, size) = match total {
            0..1_000 => ("ns", 1),
            1_000..1_000_000 => ("µs", 1_000),
            _ => ("ms", 1_000_000),
        };
        return format!("{sign}{}{unit}", decimal(total, size));
    }
    let (minutes, rest) = (total / SECOND / 60, total % (60 * SECOND));
    let seconds = format!("{}s", decimal(rest, SECOND));
    match (minutes / 60, minutes % 60) {
        (0, 0) => format!("{sign}{seconds}"),
        (0, minutes) => format!("{sign}{minutes}m{seconds}"),
        (hours, minutes) => format!("{sign}{hours}h{minutes}m{seconds}"),
    }
}

/// Prints a quotient of a power of ten, without zeros at the end.
fn decimal(value: u64, scale: u64) -> String {
    let (whole, fraction) = (value / scale, value % scale);
    if fraction == 0 {
        return whole.to_string();
    }
    let width = scale.to_string().len() - 1;
    format!("{whole}.{}", format!("{fraction:0width$}").trim_end_matches('0'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prints_durations() {
        for (nanoseconds, wanted) in [
            (0, "0s"),
            (1_500, "1.5µs"),
            (2_000_000, "2ms"),
            (1_500_000_000, "1.5s"),
            (90_000_000_000, "1m30s"),
            (3_600_000_000_000, "1h0m0s"),
        ] {
            assert_eq!(duration_text(nanoseconds), wanted);
        }
    }
}
