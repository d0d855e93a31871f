//! Network configurations of CNI: a list of plugins, or a single one.
//!
//! Source of all names: the CNI specification, version 1.1.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::network::NetworkError;

/// A network: its plugins, in the order in which they are called.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct NetworkList {
    /// The network's name.
    pub(super) name: String,
    /// The version of the specification that it follows.
    #[serde(rename = "cniVersion", default, skip_serializing_if = "Option::is_none")]
    pub(super) version: Option<String>,
    /// The plugins' own configurations.
    pub(super) plugins: Vec<Map<String, Value>>,
}

impl NetworkList {
    /// Reads a file: a list if its name ends in `.conflist`, else a single plugin. Blocking.
    pub(super) fn read(path: &Path) -> Result<Self, NetworkError> {
        let text = std::fs::read(path).map_err(|source| NetworkError::System {
            action: format!("read cni config {:?}", path.display()),
            source,
        })?;
        let is_list = path.extension().is_some_and(|extension| extension == "conflist");
        Self::parse(&text, is_list).map_err(|message| NetworkError::Invalid {
            message: format!("invalid cni config {:?}: {message}", path.display()),
        })
    }

    fn parse(text: &[u8], is_list: bool) -> Result<Self, String> {
        let list = if is_list {
            serde_json::from_slice::<Self>(text).map_err(|error| error.to_string())?
        } else {
            let plugin: Map<String, Value> =
                serde_json::from_slice(text).map_err(|error| error.to_string())?;
            let text = |key: &str| plugin.get(key).and_then(Value::as_str).map(str::to_owned);
            if plugin.contains_key("plugins") {
                return Err("it is a list of plugins; let its name end in .conflist".to_owned());
            }
            Self {
                name: text("name").ok_or("missing field `name`")?,
                version: text("cniVersion"),
                plugins: vec![plugin],
            }
        };
        if list.name.is_empty() {
            return Err("the network has no name".to_owned());
        }
        if list.plugins.is_empty() {
            return Err("the network has no plugins".to_owned());
        }
        for plugin in &list.plugins {
            plugin_type(plugin)?;
        }
        Ok(list)
    }

    /// Makes what a plugin reads: its configuration with the network's name and version and the result so far.
    pub(super) fn input(&self, plugin: &Map<String, Value>, previous: Option<&Value>) -> Vec<u8> {
        let mut input = plugin.clone();
        input.insert("name".to_owned(), Value::from(self.name.as_str()));
        if let Some(version) = &self.version {
            input.insert("cniVersion".to_owned(), Value::from(version.as_str()));
        }
        if let Some(previous) = previous {
            input.insert("prevResult".to_owned(), previous.clone());
        }
        Value::Object(input).to_string().into_bytes()
    }
}

/// Returns the name of a plugin's program: a name, no path.
pub(super) fn plugin_type(plugin: &Map<String, Value>) -> Result<&str, String> {
    let name = plugin.get("type").and_then(Value::as_str).unwrap_or_default();
    if name.is_empty() || name.starts_with('.') || name.contains(['/', '\0']) {
        return Err(format!("invalid plugin type {name:?}"));
    }
    Ok(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIST: &[u8] =
        br#"{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"bridge","x":1},{"type":"firewall"}]}"#;

    #[test]
    fn lists_and_single_plugins_are_read() {
        let list = NetworkList::parse(LIST, true).unwrap();
        assert_eq!((list.name.as_str(), list.plugins.len()), ("n", 2));
        let single = br#"{"cniVersion":"0.4.0","name":"s","type":"ptp"}"#;
        let single = NetworkList::parse(single, false).unwrap();
        assert_eq!(single.version.as_deref(), Some("0.4.0"));
        assert_eq!(plugin_type(&single.plugins[0]), Ok("ptp"));
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for text in [
            &b""[..],
            b"{}",
            br#"{"name":"","plugins":[{"type":"a"}]}"#,
            br#"{"name":"n","plugins":[]}"#,
            br#"{"name":"n","plugins":[{}]}"#,
            br#"{"name":"n","plugins":[{"type":"../x"}]}"#,
            br#"{"name":"n","plugins":[{"type":".."}]}"#,
        ] {
            assert!(
                NetworkList::parse(text, true).is_err(),
                "{}",
                String::from_utf8_lossy(text)
            );
        }
        assert!(NetworkList::parse(LIST, false).unwrap_err().contains(".conflist"));
        assert!(NetworkList::parse(br#"{"type":"ptp"}"#, false).is_err());
    }

    #[test]
    fn plugins_read_the_network_and_the_result_so_far() {
        let list = NetworkList::parse(LIST, true).unwrap();
        let input: Value = serde_json::from_slice(&list.input(&list.plugins[0], None)).unwrap();
        assert_eq!(
            input,
            serde_json::json!({"cniVersion": "1.0.0", "name": "n", "type": "bridge", "x": 1})
        );
        let result = serde_json::json!({"ips": []});
        let input: Value = serde_json::from_slice(&list.input(&list.plugins[1], Some(&result))).unwrap();
        assert_eq!(input["prevResult"], result);
    }
}
