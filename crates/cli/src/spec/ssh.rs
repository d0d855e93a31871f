//! `--ssh`: `default`, `id=/path/of/agent.sock`, `id=key1,key2`, `id=socket,raw=true`.

use super::{SpecError, go_bool};

/// An agent, a socket or keys that a build may use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AgentSpec {
    /// The name that a step asks for; empty: `default`.
    pub id: String,
    /// A socket, or key files; empty: the agent of `$SSH_AUTH_SOCK`.
    pub paths: Vec<String>,
    /// Whether bytes are passed on as they are, without looking at agent messages.
    pub raw: bool,
}

/// Reads all agents of a build.
///
/// # Errors
/// For a bad `raw`, or `raw` without exactly one path.
pub fn agents(values: &[String]) -> Result<Vec<AgentSpec>, SpecError> {
    values.iter().map(|value| agent(value)).collect()
}

fn agent(value: &str) -> Result<AgentSpec, SpecError> {
    let (id, rest) = match value.split_once('=') {
        Some((id, rest)) => (id, Some(rest)),
        None => (value, None),
    };
    let mut spec = AgentSpec {
        id: id.to_owned(),
        paths: Vec::new(),
        raw: false,
    };
    for path in rest.iter().flat_map(|rest| rest.split(',')) {
        match path.strip_prefix("raw=") {
            Some(raw) => {
                spec.raw = go_bool(raw).map_err(|error| {
                    SpecError::invalid(format!("invalid value for 'raw': {raw}: {error}"))
                })?;
            }
            None => spec.paths.push(path.to_owned()),
        }
    }
    if spec.raw && spec.paths.len() != 1 {
        return Err(SpecError::invalid(format!(
            "raw mode must supply exactly one socket path for {:?}",
            spec.id
        )));
    }
    Ok(spec)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_agents() {
        assert_eq!(
            agent("default").unwrap(),
            AgentSpec {
                id: "default".into(),
                paths: vec![],
                raw: false
            }
        );
        let spec = agent("x=/a,/b").unwrap();
        assert_eq!(spec.paths, ["/a", "/b"]);
        let spec = agent("x=/sock,raw=true").unwrap();
        assert!(spec.raw && spec.paths == ["/sock"]);
        assert!(
            agent("x=raw=true")
                .unwrap_err()
                .to_string()
                .contains("raw mode must supply exactly one socket path")
        );
        assert!(agent("x=/a,raw=maybe").is_err());
    }
}
