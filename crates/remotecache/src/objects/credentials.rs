//! Credentials for S3: attributes, the environment, the file that the command line tools share, or the service that
//! containers and machines of the provider ask.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use reqwest::{Method, Url};
use serde::Deserialize;
use tokio::sync::Mutex;

use super::Variable;
use super::http::{Anonymous, Http, Limits, ObjectError, Request};

/// Documents of the credentials service.
const MAX_BYTES: usize = 64 << 10;
/// Credentials that end sooner are asked for again.
const MARGIN: Duration = Duration::from_secs(300);
/// Where containers find theirs if they are told only a path.
const CONTAINER_HOST: &str = "http://169.254.170.2";
/// Where machines find theirs.
const MACHINE_HOST: &str = "http://169.254.169.254";

/// A key, and what proves that it may be used. Nothing of it is printed.
#[derive(Clone)]
pub(super) struct AwsCredentials {
    pub access_key_id: String,
    pub secret_access_key: String,
    pub session_token: Option<String>,
}

impl fmt::Debug for AwsCredentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AwsCredentials").finish_non_exhaustive()
    }
}

/// Where credentials come from.
#[derive(Debug)]
pub(super) enum CredentialSource {
    /// They were given.
    Given(AwsCredentials),
    /// They are asked for, and again before they end.
    Asked {
        http: Http,
        variable: Variable,
        known: Arc<Mutex<Option<(AwsCredentials, SystemTime)>>>,
    },
}

impl CredentialSource {
    /// Finds out where they come from: the attributes before the environment before the file.
    pub fn new(attrs: &BTreeMap<String, String>, variable: Variable, client: &reqwest::Client) -> Self {
        let attr = |name: &str| attrs.get(name).filter(|value| !value.is_empty()).cloned();
        let set = |name: &str| variable(name).filter(|value| !value.is_empty());
        let given = key(
            attr("access_key_id"),
            attr("secret_access_key"),
            attr("session_token"),
        );
        let given = given.or_else(|| {
            key(
                set("AWS_ACCESS_KEY_ID"),
                set("AWS_SECRET_ACCESS_KEY"),
                set("AWS_SESSION_TOKEN"),
            )
        });
        match given.or_else(|| from_file(variable)) {
            Some(credentials) => Self::Given(credentials),
            None => Self::Asked {
                // Where there is no such service nobody answers, and that has to be noticed soon.
                http: Http::new(
                    client,
                    Limits {
                        attempts: 2,
                        idle: Duration::from_secs(2),
                        ..Limits::default()
                    },
                ),
                variable,
                known: Arc::default(),
            },
        }
    }

    /// Returns credentials that can be used now.
    pub async fn get(&self) -> Result<AwsCredentials, ObjectError> {
        let (http, variable, known) = match self {
            Self::Given(credentials) => return Ok(credentials.clone()),
            Self::Asked {
                http,
                variable,
                known,
            } => (http, *variable, known),
        };
        let mut known = known.lock().await;
        if let Some((credentials, until)) = &*known
            && *until > SystemTime::now() + MARGIN
        {
            return Ok(credentials.clone());
        }
        let (credentials, until) = ask(http, variable).await?;
        *known = Some((credentials.clone(), until));
        Ok(credentials)
    }
}

fn key(id: Option<String>, secret: Option<String>, token: Option<String>) -> Option<AwsCredentials> {
    Some(AwsCredentials {
        access_key_id: id?,
        secret_access_key: secret?,
        session_token: token,
    })
}

fn from_file(variable: Variable) -> Option<AwsCredentials> {
    let path = match variable("AWS_SHARED_CREDENTIALS_FILE") {
        Some(path) => PathBuf::from(path),
        None => PathBuf::from(variable("HOME")?).join(".aws/credentials"),
    };
    let profile = variable("AWS_PROFILE").unwrap_or_else(|| "default".to_owned());
    in_profile(&std::fs::read_to_string(path).ok()?, &profile)
}

/// Reads a profile of an INI file.
fn in_profile(text: &str, profile: &str) -> Option<AwsCredentials> {
    let mut inside = false;
    let mut values = BTreeMap::new();
    for line in text.lines().map(str::trim) {
        if let Some(name) = line.strip_prefix('[').and_then(|line| line.strip_suffix(']')) {
            inside = name.trim() == profile;
        } else if inside
            && !line.starts_with(['#', ';'])
            && let Some((name, value)) = line.split_once('=')
        {
            values.insert(name.trim().to_ascii_lowercase(), value.trim().to_owned());
        }
    }
    key(
        values.remove("aws_access_key_id"),
        values.remove("aws_secret_access_key"),
        values.remove("aws_session_token"),
    )
}

/// What the services of containers and machines answer.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Answer {
    access_key_id: String,
    secret_access_key: String,
    token: Option<String>,
    expiration: Option<String>,
}

async fn ask(http: &Http, variable: Variable) -> Result<(AwsCredentials, SystemTime), ObjectError> {
    let set = |name: &str| variable(name).filter(|value| !value.is_empty());
    let none = || {
        ObjectError::Credentials {
        reason: "no credentials for the s3 cache: neither access_key_id and secret_access_key nor $AWS_ACCESS_KEY_ID, a \
                 credentials file, or a service that has them"
            .to_owned(),
    }
    };
    let container = set("AWS_CONTAINER_CREDENTIALS_FULL_URI").or_else(|| {
        set("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI").map(|path| format!("{CONTAINER_HOST}{path}"))
    });
    let body = match container {
        Some(url) => {
            let mut request = get(&url).ok_or_else(none)?;
            if let Some(token) = set("AWS_CONTAINER_AUTHORIZATION_TOKEN") {
                request = request.header("authorization", token);
            }
            fetch(http, &request).await?
        }
        None if set("AWS_EC2_METADATA_DISABLED").is_some_and(|value| value.eq_ignore_ascii_case("true")) => {
            return Err(none());
        }
        None => machine(http).await.map_err(|error| {
            tracing::debug!(%error, "no credentials from the machine's metadata");
            none()
        })?,
    };
    let answer: Answer = serde_json::from_str(&body).map_err(|_| none())?;
    let expiration = answer.expiration.as_deref().and_then(oci::timestamp::parse);
    let seconds = expiration.and_then(|(seconds, _)| u64::try_from(seconds).ok());
    let until = seconds.map_or(SystemTime::now() + MARGIN * 2, |seconds| {
        UNIX_EPOCH + Duration::from_secs(seconds)
    });
    Ok((
        AwsCredentials {
            access_key_id: answer.access_key_id,
            secret_access_key: answer.secret_access_key,
            session_token: answer.token,
        },
        until,
    ))
}

/// Asks the machine's metadata, second version: a session first, then the role, then its credentials.
async fn machine(http: &Http) -> Result<String, ObjectError> {
    let broken = || ObjectError::InvalidResponse {
        url: MACHINE_HOST.to_owned(),
        reason: "no role".to_owned(),
    };
    let url = Url::parse(&format!("{MACHINE_HOST}/latest/api/token")).map_err(|_| broken())?;
    let session = Request::new(Method::PUT, url).header("x-aws-ec2-metadata-token-ttl-seconds", "300");
    let session = fetch(http, &session).await?;
    let roles = format!("{MACHINE_HOST}/latest/meta-data/iam/security-credentials/");
    let with_session = |url: &str| Some(get(url)?.header("x-aws-ec2-metadata-token", session.clone()));
    let role = fetch(http, &with_session(&roles).ok_or_else(broken)?).await?;
    let role = role
        .lines()
        .next()
        .filter(|role| !role.is_empty())
        .ok_or_else(broken)?;
    fetch(http, &with_session(&format!("{roles}{role}")).ok_or_else(broken)?).await
}

fn get(url: &str) -> Option<Request> {
    Some(Request::new(Method::GET, Url::parse(url).ok()?))
}

async fn fetch(http: &Http, request: &Request) -> Result<String, ObjectError> {
    let response = http.succeed(request, &Anonymous).await?;
    let bytes = http.read(response, MAX_BYTES).await?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn profiles_are_read() {
        let text = "[default]\naws_access_key_id = a\n# aws_secret_access_key=x\naws_secret_access_key=b\n\n[other]\n\
                    aws_access_key_id=c\naws_secret_access_key=d=\naws_session_token=e\n";
        let found = in_profile(text, "default").unwrap();
        assert_eq!(
            (found.access_key_id.as_str(), found.secret_access_key.as_str()),
            ("a", "b")
        );
        let found = in_profile(text, "other").unwrap();
        assert_eq!(
            (found.secret_access_key.as_str(), found.session_token.as_deref()),
            ("d=", Some("e"))
        );
        assert!(in_profile(text, "absent").is_none());
        assert!(!format!("{found:?}").contains("d="));
    }
}
