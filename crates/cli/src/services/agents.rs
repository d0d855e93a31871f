//! `SSH`: agents that steps may use for signing. Keys in files are put into an `ssh-agent` of their own.

use std::collections::BTreeMap;
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use api::pb::ssh as pb;
use api::transport::MessageIo;
use futures_util::Stream;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::process::{Child, Command};
use tonic::{Request, Response, Status, Streaming};

use super::OwnedStream;
use crate::spec::AgentSpec;

/// The agent that a step gets when it names none.
const DEFAULT_ID: &str = "default";
/// The header with which a step names an agent.
const ID_HEADER: &str = "buildkit.ssh.id";
/// Longest agent message.
const MAX_MESSAGE_BYTES: u32 = 256 << 10;
/// Longest key file.
const MAX_KEY_BYTES: u64 = 100 << 10;
/// Agent requests that are passed on: list the identities, sign.
const ALLOWED_REQUESTS: [u8; 2] = [11, 13];
/// The answer to any other request.
const FAILURE: [u8; 5] = [0, 0, 0, 1, 5];

/// Why an agent cannot be offered.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// No agent runs, or `$SSH_AUTH_SOCK` is not set.
    #[error(
        "failed to convert agent config {id:?}: invalid empty ssh agent socket: make sure SSH_AUTH_SOCK is set"
    )]
    NoAgent {
        /// The agent's id.
        id: String,
    },
    /// Two agents of one id.
    #[error("duplicate agent ID {id:?}")]
    Duplicate {
        /// The id.
        id: String,
    },
    /// A path cannot be used.
    #[error("failed to convert agent config for ID: {id:?}: {path}: {source}")]
    Path {
        /// The agent's id.
        id: String,
        /// The path.
        path: String,
        /// Why.
        source: std::io::Error,
    },
    /// Sockets and keys, or several sockets, in one specification.
    #[error("failed to convert agent config for ID: {id:?}: {message}")]
    Mixed {
        /// The agent's id.
        id: String,
        /// What is wrong.
        message: &'static str,
    },
    /// `ssh-agent` or `ssh-add` cannot be run.
    #[error("keys in files need {program}: {source}")]
    Run {
        /// The program.
        program: &'static str,
        /// Why.
        source: std::io::Error,
    },
    /// A key is refused, e.g. because it needs a passphrase.
    #[error("failed to add {path} to agent: {message}")]
    Key {
        /// The key's file.
        path: String,
        /// What `ssh-add` wrote.
        message: String,
    },
}

#[derive(Clone, Debug)]
struct Agent {
    socket: PathBuf,
    raw: bool,
}

/// An `ssh-agent` with keys of files; it ends when this is dropped.
#[derive(Debug)]
struct KeyAgent {
    dir: PathBuf,
    _process: Child,
}

impl Drop for KeyAgent {
    fn drop(&mut self) {
        // A leftover directory in the temporary directory harms nobody.
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

/// Connects steps to agents.
#[derive(Clone, Debug)]
pub struct Agents {
    agents: BTreeMap<String, Agent>,
    _key_agents: Arc<Vec<KeyAgent>>,
}

impl Agents {
    /// Prepares the agents; `auth_sock` is the socket of the user's own.
    ///
    /// # Errors
    /// [`AgentError`] for what cannot be offered.
    pub async fn new(specs: Vec<AgentSpec>, auth_sock: Option<String>) -> Result<Self, AgentError> {
        let mut agents = BTreeMap::new();
        let mut key_agents = Vec::new();
        for spec in specs {
            let id = if spec.id.is_empty() {
                DEFAULT_ID.to_owned()
            } else {
                spec.id
            };
            let mut paths = spec.paths;
            paths.retain(|path| !path.is_empty());
            if paths.is_empty() {
                let socket = auth_sock.clone().filter(|socket| !socket.is_empty());
                paths.push(socket.ok_or_else(|| AgentError::NoAgent { id: id.clone() })?);
            }
            let agent = match sort_paths(&id, &paths, spec.raw)? {
                Some(socket) => Agent {
                    socket,
                    raw: spec.raw,
                },
                None => {
                    let key_agent = start_key_agent(&paths).await?;
                    let socket = key_agent.dir.join("agent");
                    key_agents.push(key_agent);
                    Agent { socket, raw: false }
                }
            };
            if agents.insert(id.clone(), agent).is_some() {
                return Err(AgentError::Duplicate { id });
            }
        }
        Ok(Self {
            agents,
            _key_agents: Arc::new(key_agents),
        })
    }

    fn agent(&self, id: &str) -> Result<&Agent, Status> {
        let id = if id.is_empty() { DEFAULT_ID } else { id };
        self.agents
            .get(id)
            .ok_or_else(|| Status::not_found(format!("unset ssh forward key {id}")))
    }
}

/// Returns the socket among the paths, or nothing when all are key files.
fn sort_paths(id: &str, paths: &[String], raw: bool) -> Result<Option<PathBuf>, AgentError> {
    let mut sockets = Vec::new();
    for path in paths {
        let found = std::fs::metadata(path).map_err(|source| AgentError::Path {
            id: id.to_owned(),
            path: path.clone(),
            source,
        })?;
        if found.file_type().is_socket() {
            sockets.push(PathBuf::from(path));
        }
    }
    let mixed = |message| {
        Err(AgentError::Mixed {
            id: id.to_owned(),
            message,
        })
    };
    match (sockets.len(), paths.len()) {
        (0, _) if raw => mixed("raw mode only supported with socket paths"),
        (0, _) => Ok(None),
        (1, 1) => Ok(sockets.pop()),
        (count, total) if count == total => mixed("only single socket allowed"),
        _ => mixed("invalid combination of keys and sockets"),
    }
}

async fn start_key_agent(keys: &[String]) -> Result<KeyAgent, AgentError> {
    let failed = |program| move |source| AgentError::Run { program, source };
    let dir = std::env::temp_dir().join(format!("cooper-agent-{}", crate::ids::new_id()));
    let mut builder = std::fs::DirBuilder::new();
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(&dir).map_err(failed("a private directory"))?;
    let socket = dir.join("agent");
    let process = Command::new("ssh-agent")
        .args(["-D", "-a"])
        .arg(&socket)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .map_err(failed("ssh-agent"))?;
    let agent = KeyAgent {
        dir,
        _process: process,
    };
    wait_for(&socket).await.map_err(failed("ssh-agent"))?;
    for key in keys {
        add_key(&socket, key).await?;
    }
    Ok(agent)
}

async fn wait_for(socket: &Path) -> std::io::Result<()> {
    let connect = async {
        while UnixStream::connect(socket).await.is_err() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(5), connect)
        .await
        .map_err(std::io::Error::from)
}

async fn add_key(socket: &Path, path: &str) -> Result<(), AgentError> {
    let unreadable = |error: std::io::Error| AgentError::Key {
        path: path.to_owned(),
        message: error.to_string(),
    };
    let mut key = Vec::new();
    let file = tokio::fs::File::open(path).await.map_err(unreadable)?;
    file.take(MAX_KEY_BYTES)
        .read_to_end(&mut key)
        .await
        .map_err(unreadable)?;
    let failed = |source| AgentError::Run {
        program: "ssh-add",
        source,
    };
    let mut child = Command::new("ssh-add")
        .args(["-q", "-"])
        .env("SSH_AUTH_SOCK", socket)
        .env("SSH_ASKPASS_REQUIRE", "never")
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(failed)?;
    if let Some(mut stdin) = child.stdin.take() {
        // `ssh-add` tells what is wrong when it does not read on.
        let _ = stdin.write_all(&key).await;
    }
    let output = child.wait_with_output().await.map_err(failed)?;
    if output.status.success() {
        return Ok(());
    }
    let message = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(AgentError::Key {
        path: path.to_owned(),
        message,
    })
}

#[tonic::async_trait]
impl pb::ssh_server::Ssh for Agents {
    async fn check_agent(
        &self,
        request: Request<pb::CheckAgentRequest>,
    ) -> Result<Response<pb::CheckAgentResponse>, Status> {
        self.agent(&request.into_inner().id)?;
        Ok(Response::new(pb::CheckAgentResponse {}))
    }

    type ForwardAgentStream = Pin<Box<dyn Stream<Item = Result<pb::BytesMessage, Status>> + Send>>;

    async fn forward_agent(
        &self,
        request: Request<Streaming<pb::BytesMessage>>,
    ) -> Result<Response<Self::ForwardAgentStream>, Status> {
        let id = request
            .metadata()
            .get(ID_HEADER)
            .and_then(|id| id.to_str().ok())
            .unwrap_or_default();
        let agent = self.agent(id)?.clone();
        let socket = UnixStream::connect(&agent.socket).await.map_err(|error| {
            Status::unknown(format!(
                "failed to connect to {}: {error}",
                agent.socket.display()
            ))
        })?;
        let incoming = request.into_inner();
        let answers = OwnedStream::new(8, |sender| async move {
            let step = MessageIo::new(incoming, sender);
            let result = if agent.raw {
                copy(step, socket).await
            } else {
                filter(step, socket).await
            };
            result.map_err(|error| Status::unknown(error.to_string()))
        });
        Ok(Response::new(Box::pin(answers)))
    }
}

async fn copy(mut step: impl AsyncRead + AsyncWrite + Unpin, mut socket: UnixStream) -> std::io::Result<()> {
    tokio::io::copy_bidirectional(&mut step, &mut socket)
        .await
        .map(|_| ())
}

/// Passes on requests that only use the agent, and answers others with a failure.
async fn filter(
    mut step: impl AsyncRead + AsyncWrite + Unpin,
    mut socket: impl AsyncRead + AsyncWrite + Unpin,
) -> std::io::Result<()> {
    while let Some(request) = read_message(&mut step).await? {
        if !request.get(4).is_some_and(|kind| ALLOWED_REQUESTS.contains(kind)) {
            step.write_all(&FAILURE).await?;
            step.flush().await?;
            continue;
        }
        socket.write_all(&request).await?;
        let Some(answer) = read_message(&mut socket).await? else {
            return Ok(());
        };
        step.write_all(&answer).await?;
        step.flush().await?;
    }
    Ok(())
}

/// Reads a message with its length in front; nothing at the end of the stream.
async fn read_message(from: &mut (impl AsyncRead + Unpin)) -> std::io::Result<Option<Vec<u8>>> {
    let mut head = [0; 4];
    match from.read_exact(&mut head).await {
        Ok(_) => {}
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error),
    }
    let len = u32::from_be_bytes(head);
    if len == 0 || len > MAX_MESSAGE_BYTES {
        return Err(std::io::Error::new(
            std::io::ErrorKind::InvalidData,
            "agent message of a bad length",
        ));
    }
    let mut message = head.to_vec();
    from.take(u64::from(len)).read_to_end(&mut message).await?;
    Ok(Some(message))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_listing_and_signing_reach_the_agent() {
        let (mut step, filtered) = tokio::io::duplex(1024);
        let (agent_side, mut agent) = tokio::io::duplex(1024);
        let task = tokio::spawn(filter(filtered, agent_side));
        step.write_all(&[0, 0, 0, 1, 19]).await.unwrap();
        let mut answer = [0; 5];
        step.read_exact(&mut answer).await.unwrap();
        assert_eq!(answer, FAILURE);
        step.write_all(&[0, 0, 0, 1, 11]).await.unwrap();
        let mut request = [0; 5];
        agent.read_exact(&mut request).await.unwrap();
        assert_eq!(request, [0, 0, 0, 1, 11]);
        agent.write_all(&[0, 0, 0, 5, 12, 0, 0, 0, 0]).await.unwrap();
        let mut answer = [0; 9];
        step.read_exact(&mut answer).await.unwrap();
        assert_eq!(answer, [0, 0, 0, 5, 12, 0, 0, 0, 0]);
        drop(step);
        task.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn refuses_what_cannot_be_an_agent() {
        let spec = |paths: &[&str], raw| AgentSpec {
            id: "x".to_owned(),
            paths: paths.iter().map(|path| (*path).to_owned()).collect(),
            raw,
        };
        let make = async |spec: AgentSpec| Agents::new(vec![spec], None).await.unwrap_err().to_string();
        assert!(
            make(spec(&[], false))
                .await
                .contains("invalid empty ssh agent socket")
        );
        assert!(
            make(spec(&["/nonexistent"], false))
                .await
                .contains("/nonexistent")
        );
        assert!(
            make(spec(&["/dev/null"], true))
                .await
                .contains("raw mode only supported with socket paths")
        );
    }
}
