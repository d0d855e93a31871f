//! Calling plugins.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Map, Value};

use super::list::{NetworkList, plugin_type};
use crate::network::program;

/// How long a plugin may take: some wait for an address from a server.
const LIMIT: Duration = Duration::from_secs(120);
/// The device's name in containers.
const INSIDE: &str = "eth0";

/// Whose network is made or removed.
#[derive(Clone, Debug)]
pub(super) struct Target<'a> {
    /// Names the container to the plugins.
    pub(super) id: &'a str,
    /// Path of the namespace; empty if it is gone.
    pub(super) namespace: &'a str,
    /// `key=value` pairs separated by `;`, for plugins that want to know more.
    pub(super) arguments: &'a str,
}

/// What plugins say of failures.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Refusal {
    msg: String,
    details: String,
}

/// The programs.
#[derive(Clone, Debug)]
pub(super) struct Plugins {
    /// The directory they are in.
    pub(super) directory: PathBuf,
}

impl Plugins {
    /// Connects a namespace: calls all plugins in order. Returns their result. Blocking.
    pub(super) fn add(&self, list: &NetworkList, target: &Target<'_>) -> Result<Value, String> {
        let mut result = None;
        for plugin in &list.plugins {
            let output = self.call("ADD", plugin, &list.input(plugin, result.as_ref()), target)?;
            let parsed = serde_json::from_slice(&output);
            result = Some(parsed.map_err(|error| describe(plugin, "ADD", &format!("its result: {error}")))?);
        }
        Ok(result.unwrap_or_default())
    }

    /// Disconnects a namespace: calls all plugins in reverse order, whatever each of them says. Blocking.
    pub(super) fn delete(
        &self,
        list: &NetworkList,
        result: Option<&Value>,
        target: &Target<'_>,
    ) -> Result<(), String> {
        let mut failures = Vec::new();
        for plugin in list.plugins.iter().rev() {
            if let Err(failure) = self.call("DEL", plugin, &list.input(plugin, result), target) {
                failures.push(failure);
            }
        }
        if failures.is_empty() {
            return Ok(());
        }
        Err(failures.join("; "))
    }

    fn call(
        &self,
        command: &str,
        plugin: &Map<String, Value>,
        input: &[u8],
        target: &Target<'_>,
    ) -> Result<Vec<u8>, String> {
        let failed = |message: &str| describe(plugin, command, message);
        let program = self.directory.join(plugin_type(plugin)?);
        let mut process = Command::new(&program);
        process
            .env("CNI_COMMAND", command)
            .env("CNI_CONTAINERID", target.id)
            .env("CNI_NETNS", target.namespace)
            .env("CNI_IFNAME", INSIDE)
            .env("CNI_PATH", &self.directory)
            .env("CNI_ARGS", target.arguments);
        let output = program::run(&mut process, input, LIMIT)
            .map_err(|error| failed(&format!("{}: {error}", program.display())))?;
        if output.status.success() {
            return Ok(output.stdout);
        }
        let refusal: Refusal = serde_json::from_slice(&output.stdout).unwrap_or_default();
        let message = match (refusal.msg.is_empty(), refusal.details.is_empty()) {
            (true, _) => format!("{} {}", output.status, output.stderr),
            (false, true) => refusal.msg,
            (false, false) => format!("{}; {}", refusal.msg, refusal.details),
        };
        Err(failed(message.trim()))
    }
}

fn describe(plugin: &Map<String, Value>, command: &str, message: &str) -> String {
    let name = plugin_type(plugin).unwrap_or_default();
    let command = command.to_ascii_lowercase();
    format!("plugin type={name:?} failed ({command}): {message}")
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;
    use std::path::Path;

    use super::*;

    /// A plugin that notes how it was called and answers what it is told.
    fn plugin(directory: &Path, name: &str, script: &str) {
        let path = directory.join(name);
        let log = directory.join("log");
        let script = format!(
            "#!/bin/sh\necho \"{name} $CNI_COMMAND $CNI_CONTAINERID $CNI_NETNS $CNI_IFNAME $CNI_ARGS $(cat)\" >> {}\n{script}\n",
            log.display()
        );
        std::fs::write(&path, script).unwrap();
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
    }

    fn list() -> NetworkList {
        serde_json::from_value(serde_json::json!({
            "cniVersion": "1.0.0",
            "name": "n",
            "plugins": [{"type": "one"}, {"type": "two"}],
        }))
        .unwrap()
    }

    const TARGET: Target<'_> = Target {
        id: "c1",
        namespace: "/ns",
        arguments: "",
    };

    #[test]
    fn plugins_are_called_in_order_and_back() {
        let directory = tempfile::tempdir().unwrap();
        plugin(directory.path(), "one", r#"echo '{"a":1}'"#);
        plugin(directory.path(), "two", r#"echo '{"b":2}'"#);
        let plugins = Plugins {
            directory: directory.path().to_owned(),
        };
        let result = plugins.add(&list(), &TARGET).unwrap();
        assert_eq!(result, serde_json::json!({"b": 2}));
        plugins.delete(&list(), Some(&result), &TARGET).unwrap();
        let log = std::fs::read_to_string(directory.path().join("log")).unwrap();
        let calls: Vec<&str> = log.lines().collect();
        assert!(
            calls[0].starts_with("one ADD c1 /ns eth0  {") && !calls[0].contains("prevResult"),
            "{log}"
        );
        assert!(
            calls[1].starts_with("two ADD") && calls[1].contains(r#""prevResult":{"a":1}"#),
            "{log}"
        );
        assert!(
            calls[2].starts_with("two DEL") && calls[2].contains(r#""prevResult":{"b":2}"#),
            "{log}"
        );
        assert!(calls[3].starts_with("one DEL"), "{log}");
    }

    #[test]
    fn failures_are_told_in_the_plugins_words() {
        let directory = tempfile::tempdir().unwrap();
        plugin(
            directory.path(),
            "one",
            r#"echo '{"code":11,"msg":"no","details":"why"}'; exit 1"#,
        );
        plugin(directory.path(), "two", "echo oops >&2; exit 2");
        let plugins = Plugins {
            directory: directory.path().to_owned(),
        };
        let error = plugins.add(&list(), &TARGET).unwrap_err();
        assert_eq!(error, r#"plugin type="one" failed (add): no; why"#);
        // The other is called nevertheless.
        let error = plugins.delete(&list(), None, &TARGET).unwrap_err();
        assert!(error.contains("oops") && error.contains("no; why"), "{error}");
        std::fs::remove_file(directory.path().join("one")).unwrap();
        assert!(plugins.add(&list(), &TARGET).unwrap_err().contains("/one: "));
    }
}
