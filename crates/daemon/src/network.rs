//! The network of steps, as the configuration asks for it.

use std::path::PathBuf;

use executor::{BridgeConfig, CniConfig, NetworkChoice};

use crate::config::{ConfigError, OciTable};

/// Defaults of BuildKit (`util/appdefaults`).
const CNI_CONFIG: &str = "/etc/buildkit/cni.json";
const CNI_PLUGINS: &str = "/opt/cni/bin";
const BRIDGE_NAME: &str = "buildkit0";
const BRIDGE_SUBNET: &str = "10.10.0.0/16";
/// Makes the bridge the network of the mode `auto`.
const BRIDGE_AUTO: &str = "BUILDKIT_NETWORK_BRIDGE_AUTO";

/// What steps get, and what it is called in the worker's labels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StepNetwork {
    /// The network.
    pub choice: NetworkChoice,
    /// `host` or `cni`; BuildKit's bridge is one of CNI, too.
    pub label: &'static str,
}

fn or_default(text: &str, default: &str) -> String {
    if text.is_empty() { default } else { text }.to_owned()
}

/// Decides on the network. `env` reads a variable.
///
/// # Errors
/// For a mode that is not known.
pub fn step_network(
    oci: &OciTable,
    env: impl Fn(&str) -> Option<String>,
) -> Result<StepNetwork, ConfigError> {
    let pool_size = usize::try_from(oci.cni_pool_size).unwrap_or(0);
    let cni = CniConfig {
        config_path: PathBuf::from(or_default(&oci.cni_config_path, CNI_CONFIG)),
        binary_dir: PathBuf::from(or_default(&oci.cni_binary_path, CNI_PLUGINS)),
        pool_size,
    };
    let bridge = || StepNetwork {
        choice: NetworkChoice::Bridge(BridgeConfig {
            name: or_default(&oci.bridge_name, BRIDGE_NAME),
            subnet: or_default(&oci.bridge_subnet, BRIDGE_SUBNET),
            pool_size,
        }),
        label: "cni",
    };
    let host = StepNetwork {
        choice: NetworkChoice::Host,
        label: "host",
    };
    let is_true = |text: String| matches!(text.as_str(), "1" | "t" | "T" | "true" | "TRUE" | "True");
    match oci.network_mode.as_str() {
        "host" => Ok(host),
        "bridge" => Ok(bridge()),
        "" | "auto" if oci.rootless => Ok(host),
        "" | "auto" if env(BRIDGE_AUTO).is_some_and(is_true) => Ok(bridge()),
        "" | "auto" if !cni.config_path.exists() => {
            tracing::info!("steps use the host's network");
            Ok(host)
        }
        "" | "auto" | "cni" => Ok(StepNetwork {
            choice: NetworkChoice::Cni(cni),
            label: "cni",
        }),
        mode => Err(ConfigError::invalid(format!(
            "invalid network mode: {mode:?}; known are auto, host, bridge and cni"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decide(mode: &str, config: &str) -> Result<StepNetwork, ConfigError> {
        let oci = OciTable {
            network_mode: mode.to_owned(),
            cni_config_path: config.to_owned(),
            ..OciTable::default()
        };
        step_network(&oci, |_| None)
    }

    #[test]
    fn the_mode_is_what_is_asked_for() {
        assert_eq!(decide("host", "").unwrap().choice, NetworkChoice::Host);
        let bridge = decide("bridge", "").unwrap();
        assert_eq!(
            bridge.choice,
            NetworkChoice::Bridge(BridgeConfig {
                name: "buildkit0".to_owned(),
                subnet: "10.10.0.0/16".to_owned(),
                pool_size: 0,
            })
        );
        assert_eq!(bridge.label, "cni");
        assert!(
            decide("none", "")
                .unwrap_err()
                .to_string()
                .contains("invalid network mode: \"none\"")
        );
    }

    #[test]
    fn auto_is_cni_where_it_is_configured() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let path = file.path().to_str().unwrap();
        for mode in ["", "auto"] {
            assert!(matches!(
                decide(mode, path).unwrap().choice,
                NetworkChoice::Cni(_)
            ));
            assert_eq!(
                decide(mode, "/nonexistent/cni.json").unwrap().choice,
                NetworkChoice::Host
            );
        }
        let oci = OciTable {
            rootless: true,
            cni_config_path: path.to_owned(),
            ..OciTable::default()
        };
        assert_eq!(step_network(&oci, |_| None).unwrap().choice, NetworkChoice::Host);
        let automatic = step_network(&OciTable::default(), |_| Some("true".to_owned())).unwrap();
        assert!(matches!(automatic.choice, NetworkChoice::Bridge(_)));
    }
}
