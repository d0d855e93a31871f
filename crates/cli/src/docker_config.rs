//! Registry accounts from Docker's `config.json`: written in it, or kept by a credential helper.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Stdio;

use base64::Engine as _;
use serde::Deserialize;
use tokio::io::AsyncWriteExt as _;

/// The key under which Docker Hub's account is kept.
const HUB_KEY: &str = "https://index.docker.io/v1/";
/// The host that Docker Hub's registry is reached at.
const HUB_HOST: &str = "registry-1.docker.io";
/// Longest answer of a credential helper that is read.
const MAX_ANSWER_BYTES: usize = 1 << 20;

/// Why an account cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum DockerConfigError {
    /// The file cannot be read.
    #[error("failed to read {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is no configuration.
    #[error("failed to parse {path}: {source}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Why.
        source: serde_json::Error,
    },
    /// A helper cannot be run.
    #[error("error getting credentials - err: {source}: docker-credential-{helper}")]
    Run {
        /// The helper's name.
        helper: String,
        /// Why.
        source: std::io::Error,
    },
    /// A helper refused.
    #[error("error getting credentials - docker-credential-{helper}: {message}")]
    Refused {
        /// The helper's name.
        helper: String,
        /// What it wrote.
        message: String,
    },
}

/// An account.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Account {
    /// User name; empty with a secret: the secret is an identity token.
    pub username: String,
    /// Password or identity token.
    pub secret: String,
    /// A bearer token to be used as it is; empty: none.
    pub registry_token: String,
}

impl std::fmt::Debug for Account {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Account")
            .field("username", &self.username)
            .finish_non_exhaustive()
    }
}

#[derive(Clone, Debug, Default, Deserialize)]
struct File {
    #[serde(default)]
    auths: BTreeMap<String, AuthEntry>,
    #[serde(default, rename = "credsStore")]
    creds_store: String,
    #[serde(default, rename = "credHelpers")]
    cred_helpers: BTreeMap<String, String>,
}

#[derive(Clone, Default, Deserialize)]
struct AuthEntry {
    #[serde(default)]
    auth: String,
    #[serde(default)]
    username: String,
    #[serde(default)]
    password: String,
    #[serde(default)]
    identitytoken: String,
    #[serde(default)]
    registrytoken: String,
}

impl std::fmt::Debug for AuthEntry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("AuthEntry")
    }
}

#[derive(Deserialize)]
struct HelperAnswer {
    #[serde(rename = "Username", default)]
    username: String,
    #[serde(rename = "Secret", default)]
    secret: String,
}

/// Where Docker's clients keep what they know of a user: `$DOCKER_CONFIG` or `~/.docker`.
pub fn directory() -> Option<PathBuf> {
    std::env::var_os("DOCKER_CONFIG")
        .filter(|dir| !dir.is_empty())
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".docker")))
}

/// The configuration.
#[derive(Clone, Debug, Default)]
pub struct DockerConfig {
    file: File,
}

impl DockerConfig {
    /// Reads `$DOCKER_CONFIG/config.json` or `~/.docker/config.json`; a missing file is an empty configuration.
    ///
    /// # Errors
    /// When the file exists and cannot be used.
    pub fn load() -> Result<Self, DockerConfigError> {
        let Some(dir) = directory() else {
            return Ok(Self::default());
        };
        let path = dir.join("config.json");
        match std::fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text)
                .map(|file| Self { file })
                .map_err(|source| DockerConfigError::Parse { path, source }),
            Err(error)
                if matches!(
                    error.kind(),
                    std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory
                ) =>
            {
                Ok(Self::default())
            }
            Err(source) => Err(DockerConfigError::Read { path, source }),
        }
    }

    /// Finds the account of a registry host; one that is not known is empty.
    ///
    /// # Errors
    /// When a credential helper fails for another reason than not knowing the host.
    pub async fn account(&self, host: &str) -> Result<Account, DockerConfigError> {
        let key = if host == HUB_HOST { HUB_KEY } else { host };
        let helper = self.file.cred_helpers.get(key).unwrap_or(&self.file.creds_store);
        if !helper.is_empty() {
            return ask_helper(helper, key).await;
        }
        Ok(self.entry(key).map(account_of).unwrap_or_default())
    }

    /// Finds the entry of a host, also when it was written with a scheme or a path.
    fn entry(&self, key: &str) -> Option<&AuthEntry> {
        let host_of = |key: &str| {
            let rest = key
                .strip_prefix("https://")
                .or_else(|| key.strip_prefix("http://"))
                .unwrap_or(key);
            rest.split('/').next().unwrap_or_default().to_owned()
        };
        self.file.auths.get(key).or_else(|| {
            let wanted = host_of(key);
            self.file
                .auths
                .iter()
                .find(|(known, _)| host_of(known) == wanted)
                .map(|(_, entry)| entry)
        })
    }
}

fn account_of(entry: &AuthEntry) -> Account {
    let decoded = base64::engine::general_purpose::STANDARD
        .decode(&entry.auth)
        .ok()
        .and_then(|bytes| String::from_utf8(bytes).ok())
        .unwrap_or_default();
    let (username, password) = match decoded.split_once(':') {
        Some((username, password)) => (username.to_owned(), password.trim_end_matches('\0').to_owned()),
        None => (entry.username.clone(), entry.password.clone()),
    };
    let registry_token = entry.registrytoken.clone();
    if entry.identitytoken.is_empty() {
        Account {
            username,
            secret: password,
            registry_token,
        }
    } else {
        Account {
            username: String::new(),
            secret: entry.identitytoken.clone(),
            registry_token,
        }
    }
}

async fn ask_helper(helper: &str, key: &str) -> Result<Account, DockerConfigError> {
    let failed = |source| DockerConfigError::Run {
        helper: helper.to_owned(),
        source,
    };
    let mut child = tokio::process::Command::new(format!("docker-credential-{helper}"))
        .arg("get")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .map_err(failed)?;
    if let Some(mut stdin) = child.stdin.take() {
        // A helper that ends before it reads tells why by its answer.
        let _ = stdin.write_all(key.as_bytes()).await;
    }
    let output = child.wait_with_output().await.map_err(failed)?;
    let answer = &output.stdout[..output.stdout.len().min(MAX_ANSWER_BYTES)];
    if !output.status.success() {
        let message = String::from_utf8_lossy(answer).trim().to_owned();
        if message.contains("credentials not found") {
            return Ok(Account::default());
        }
        return Err(DockerConfigError::Refused {
            helper: helper.to_owned(),
            message,
        });
    }
    let answer: HelperAnswer =
        serde_json::from_slice(answer).map_err(|error| DockerConfigError::Refused {
            helper: helper.to_owned(),
            message: format!("unreadable answer: {error}"),
        })?;
    let username = if answer.username == "<token>" {
        String::new()
    } else {
        answer.username
    };
    Ok(Account {
        username,
        secret: answer.secret,
        registry_token: String::new(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(text: &str) -> DockerConfig {
        DockerConfig {
            file: serde_json::from_str(text).unwrap(),
        }
    }

    #[tokio::test]
    async fn finds_written_accounts() {
        let config = config(
            r#"{"auths":{"https://index.docker.io/v1/":{"auth":"dTpwOnE="},"https://example.com/v2/":{"auth":"YTpi"},
                "token.example.com":{"identitytoken":"t"}}}"#,
        );
        let account = config.account("registry-1.docker.io").await.unwrap();
        assert_eq!((account.username.as_str(), account.secret.as_str()), ("u", "p:q"));
        assert_eq!(config.account("example.com").await.unwrap().username, "a");
        let account = config.account("token.example.com").await.unwrap();
        assert_eq!((account.username.as_str(), account.secret.as_str()), ("", "t"));
        assert_eq!(
            config.account("other.example.com").await.unwrap(),
            Account::default()
        );
    }

    #[tokio::test]
    async fn a_missing_helper_is_an_error() {
        let config = config(r#"{"credHelpers":{"example.com":"of-no-kind"}}"#);
        assert!(
            config
                .account("example.com")
                .await
                .unwrap_err()
                .to_string()
                .contains("docker-credential-of-no-kind")
        );
        assert_eq!(
            config.account("other.example.com").await.unwrap(),
            Account::default()
        );
    }

    #[test]
    fn secrets_are_not_printed() {
        let config = config(r#"{"auths":{"example.com":{"auth":"YTpzZWNyZXQ=","password":"secret"}}}"#);
        assert!(!format!("{config:?}").contains("secret"));
        assert!(!format!("{config:?}").contains("YTpz"));
    }
}
