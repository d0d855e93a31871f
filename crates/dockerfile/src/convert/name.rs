//! Names of steps as the user sees them.

use oci::Platform;

use super::Converter;
use super::stages::StageId;
use crate::text;
use crate::word::{Lexer, Variables};

impl Converter<'_> {
    /// Names the next step of a stage, e.g. `[linux/amd64 build 2/3] RUN make`, and counts it.
    pub(super) fn step_name(
        &mut self,
        id: StageId,
        step: &str,
        with_platform: bool,
        platform: Option<&Platform>,
        env: &dyn Variables,
    ) -> String {
        let stage = &mut self.stages[id.0];
        if stage.command_total == 0 {
            return step.to_owned();
        }
        let mut name = "[".to_owned();
        if let Some(platform) = platform.filter(|_| with_platform) {
            name.push_str(&platform.format_all());
            name.push_str(&cross_target(platform, env));
            name.push(' ');
        }
        if !stage.stage_name.is_empty() {
            name.push_str(&stage.stage_name);
            name.push(' ');
        }
        stage.command_index += 1;
        let (index, total) = (stage.command_index, stage.command_total);
        let width = total.to_string().len();
        let onbuild = if stage.in_onbuild { "ONBUILD " } else { "" };
        format!("{name}{index:width$}/{total}] {onbuild}{step}")
    }

    /// Names the step of an instruction.
    pub(super) fn instruction_name(
        &mut self,
        id: StageId,
        text: &str,
        platform: Option<&Platform>,
    ) -> String {
        let env = self.stages[id.0].env.clone();
        let with_platform = self.contexts.options.multi_platform;
        self.step_name(id, text, with_platform, platform, &env)
    }
}

/// Expands the variables of an instruction's text, and writes its name in upper case.
pub(super) fn shown(lexer: &Lexer, code: &str, env: &dyn Variables) -> String {
    let (expanded, result) = lexer.expand(code, env);
    text::uppercase_first_word(if result.is_ok() { &expanded.text } else { code })
}

/// Names the platform that is compiled for, if it is another one than that of the stage.
fn cross_target(base: &Platform, env: &dyn Variables) -> String {
    let Some(mut target) = target_of(env) else {
        return String::new();
    };
    if target.os.is_empty() {
        target.os.clone_from(&base.os);
    }
    if target.architecture.is_empty() {
        target.architecture.clone_from(&base.architecture);
    }
    let target = target.normalized();
    if target.os != base.os {
        return format!("->{}", target.format_all());
    }
    if target.architecture == base.architecture {
        return String::new();
    }
    let variant = if target.variant.is_empty() {
        String::new()
    } else {
        format!("/{}", target.variant)
    };
    format!("->{}{variant}", target.architecture)
}

/// Reads the platform that variables name.
fn target_of(env: &dyn Variables) -> Option<Platform> {
    let mut target = Platform::default();
    let mut set = false;
    let whole = env.get("TARGETPLATFORM");
    if let Some(platform) = whole.and_then(|value| Platform::parse(value).ok()) {
        return Some(platform);
    }
    let parts = [
        ("TARGETOS", &mut target.os),
        ("TARGETARCH", &mut target.architecture),
        ("TARGETVARIANT", &mut target.variant),
    ];
    for (name, field) in parts {
        if let Some(value) = env.get(name) {
            value.clone_into(field);
            set = true;
        }
    }
    set.then_some(target)
}
