//! What a remote asks for before it answers: tokens, agents, known hosts. All of it lives as long as the [`Access`].

use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use build::agent::AgentSocket;
use build::error::{BuildError, ErrorKind};
use build::name::random_name;
use build::session::{Session, SessionError, SessionGroup};
use llb::pb;

use super::attributes::Attributes;

/// Variables of the daemon's environment that Git gets.
const PASSED: [&str; 9] = [
    "PATH",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
    "ALL_PROXY",
    "http_proxy",
    "https_proxy",
    "no_proxy",
    "all_proxy",
];

/// What Git is given to reach a remote.
pub(super) struct Access {
    /// Environment.
    pub env: Vec<(String, OsString)>,
    /// Configuration; may be secret.
    pub config: Vec<(String, String)>,
    /// What must not be shown, and what is shown instead.
    hidden: Vec<(String, String)>,
    _agent: Option<AgentSocket>,
    _known_hosts: Option<TempFile>,
}

impl fmt::Debug for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Access").finish_non_exhaustive()
    }
}

impl Access {
    /// Collects what the clients have for the remote. `dir` is for files and sockets that Git needs meanwhile.
    pub async fn open(
        dir: &Path,
        attributes: &Attributes,
        sessions: &SessionGroup,
    ) -> Result<Self, BuildError> {
        let env = PASSED
            .iter()
            .filter_map(|name| Some(((*name).to_owned(), std::env::var_os(name)?)))
            .collect();
        let mut hidden = Vec::new();
        let credentials = attributes.credentials();
        if let Some((user, password)) = &credentials {
            hidden.push((attributes.remote.clone(), attributes.shown_remote()));
            // A token may come as user or as password.
            let secret = if password.is_empty() { user } else { password };
            if !secret.is_empty() {
                hidden.push((secret.clone(), "xxxxx".to_owned()));
            }
        }
        let mut this = Self {
            env,
            config: Vec::new(),
            hidden,
            _agent: None,
            _known_hosts: None,
        };
        if let Some((user, password)) = credentials {
            this.answer(attributes, &user, &password)?;
        }
        this.authorize(attributes, sessions).await?;
        this.prepare_ssh(dir, attributes, sessions).await?;
        Ok(this)
    }

    /// Takes secrets out of a text.
    pub fn redact(&self, text: &str) -> String {
        let replaced =
            |text: String, (secret, shown): &(String, String)| text.replace(secret.as_str(), shown);
        self.hidden.iter().fold(text.to_owned(), replaced)
    }

    /// Lets Git ask a helper for the account of the remote's host. The helper's own text holds nothing secret.
    fn answer(&mut self, attributes: &Attributes, user: &str, password: &str) -> Result<(), BuildError> {
        if [user, password]
            .iter()
            .any(|text| text.bytes().any(|byte| byte.is_ascii_control()))
        {
            return Err(BuildError::user(
                "the credentials of a git URL are not one line each",
            ));
        }
        let scheme = attributes.remote.split("://").next().unwrap_or_default();
        let host = attributes.http_host().unwrap_or_default();
        let helper =
            r#"!f() { printf 'username=%s\npassword=%s\n' "$COOPER_GIT_USER" "$COOPER_GIT_PASSWORD"; }; f"#;
        self.config
            .push((format!("credential.{scheme}://{host}.helper"), helper.to_owned()));
        self.env.push(("COOPER_GIT_USER".to_owned(), user.into()));
        self.env.push(("COOPER_GIT_PASSWORD".to_owned(), password.into()));
        Ok(())
    }

    async fn authorize(
        &mut self,
        attributes: &Attributes,
        sessions: &SessionGroup,
    ) -> Result<(), BuildError> {
        let Some(host) = attributes.http_host() else {
            return Ok(());
        };
        let (header, token) = (&attributes.header_secret, &attributes.token_secret);
        let for_host = |name: &str| format!("{name}.{host}");
        let names = [
            (for_host(header), header.is_empty(), false),
            (for_host(token), token.is_empty(), true),
            (header.clone(), header.is_empty(), false),
            (token.clone(), token.is_empty(), true),
        ];
        for (name, is_unset, is_token) in names {
            if is_unset {
                continue;
            }
            let asked = sessions.any(|session| {
                let name = name.clone();
                async move { session.secret(&name).await }
            });
            // A public repository needs no secret, and a client without any builds from it.
            let Ok(secret) = asked.await else { continue };
            let secret = String::from_utf8_lossy(&secret).trim_end().to_owned();
            if secret.bytes().any(|byte| byte.is_ascii_control()) {
                return Err(BuildError::user(format!("secret {name} is not one line")));
            }
            let value = if is_token {
                format!("basic {}", STANDARD.encode(format!("x-access-token:{secret}")))
            } else {
                secret.clone()
            };
            let key = format!("http.{}.extraheader", token_scope(&attributes.plain_remote()));
            for text in [&value, &secret] {
                if !text.is_empty() {
                    self.hidden.push((text.clone(), "xxxxx".to_owned()));
                }
            }
            self.config.push((key, format!("Authorization: {value}")));
            return Ok(());
        }
        Ok(())
    }

    async fn prepare_ssh(
        &mut self,
        dir: &Path,
        attributes: &Attributes,
        sessions: &SessionGroup,
    ) -> Result<(), BuildError> {
        // Neither the configuration nor the keys of the user that the daemon runs as are for its clients.
        let mut ssh = "ssh -F /dev/null -o BatchMode=yes -o IdentityFile=none".to_owned();
        if attributes.known_hosts.is_empty() {
            ssh.push_str(" -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null");
        } else {
            let file = TempFile::create(dir, &attributes.known_hosts)?;
            ssh.push_str(&format!(" -o UserKnownHostsFile={}", shell_quoted(&file.0)?));
            self._known_hosts = Some(file);
        }
        self.env.push(("GIT_SSH_COMMAND".to_owned(), ssh.into()));
        if attributes.agent.is_empty() {
            return Ok(());
        }
        let session = agent_session(sessions, &attributes.agent).await?;
        let options = pb::SshOpt {
            id: attributes.agent.clone(),
            uid: rustix::process::geteuid().as_raw(),
            gid: rustix::process::getegid().as_raw(),
            mode: 0o700,
            ..pb::SshOpt::default()
        };
        let agent = AgentSocket::open(dir, session, &options).await?;
        self.env.push(("SSH_AUTH_SOCK".to_owned(), agent.path().into()));
        self._agent = Some(agent);
        Ok(())
    }
}

async fn agent_session(sessions: &SessionGroup, id: &str) -> Result<Arc<dyn Session>, BuildError> {
    let found = sessions.any(|session| async move {
        session.check_agent(id).await?;
        Ok(session)
    });
    found.await.map_err(|error| match error {
        SessionError::Unsupported { .. } => {
            BuildError::user(format!("no SSH key {id:?} forwarded from the client"))
        }
        error => error.into(),
    })
}

/// For which URLs a token is sent. Those of GitHub are good for submodules there too.
fn token_scope(remote: &str) -> &str {
    ["https://github.com/", "https://www.github.com/"]
        .into_iter()
        .find(|prefix| remote.starts_with(prefix))
        .unwrap_or(remote)
}

fn shell_quoted(path: &Path) -> Result<String, BuildError> {
    let text = path
        .to_str()
        .ok_or_else(|| BuildError::internal("the state directory's path is not UTF-8"))?;
    // SSH splits the option's value at spaces, unless they are within double quotes.
    let text = if text.contains(' ') {
        format!("\"{text}\"")
    } else {
        text.to_owned()
    };
    Ok(format!("'{}'", text.replace('\'', r"'\''")))
}

/// A file that goes with its handle.
pub(super) struct TempFile(PathBuf);

impl TempFile {
    /// Takes charge of a file that was just made.
    pub fn new(path: PathBuf) -> Self {
        Self(path)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }

    fn create(dir: &Path, content: &str) -> Result<Self, BuildError> {
        let this = Self(dir.join(random_name()));
        std::fs::write(&this.0, content).map_err(|error| {
            BuildError::from_source(ErrorKind::Internal, error).context("failed to write known hosts")
        })?;
        Ok(this)
    }
}

impl Drop for TempFile {
    fn drop(&mut self) {
        // What cannot be removed now goes with the directory at the next start.
        let _ = std::fs::remove_file(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_go_to_one_remote_or_to_github() {
        assert_eq!(token_scope("https://github.com/a/b.git"), "https://github.com/");
        assert_eq!(
            token_scope("https://github.com.evil/a"),
            "https://github.com.evil/a"
        );
        assert_eq!(token_scope("https://h/a"), "https://h/a");
    }

    #[test]
    fn quotes_paths_for_shell_and_ssh() {
        assert_eq!(shell_quoted(Path::new("/a/b")).expect("is UTF-8"), "'/a/b'");
        assert_eq!(shell_quoted(Path::new("/a b")).expect("is UTF-8"), "'\"/a b\"'");
        assert_eq!(shell_quoted(Path::new("/a'b")).expect("is UTF-8"), r"'/a'\''b'");
    }
}
