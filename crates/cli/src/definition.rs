//! Definitions in files: printing one, comparing two.

use std::io::{IsTerminal as _, Read as _};
use std::path::Path;

use llb::pb::Definition;
use llb::{Graph, compare, dump};
use prost::Message as _;

use crate::buildctl::args::DumpLlbArgs;
use crate::buildctl::write_stdout;
use crate::failure::Failure;

/// Prints a definition, one operation a line of JSON or as a graph for Graphviz.
///
/// # Errors
/// When the file cannot be read or is no definition.
pub fn dump(args: &DumpLlbArgs) -> Result<(), Failure> {
    let path = args.file.as_deref().unwrap_or(Path::new("-"));
    write_stdout(&render(&read(path)?, args.dot)?)
}

/// Shows what differs between the graphs of two definitions.
///
/// # Errors
/// When a file cannot be read or holds no valid definition.
pub fn diff(before: &Path, after: &Path) -> Result<(), Failure> {
    if is_stdin(before) && is_stdin(after) {
        return Err(Failure::new("only one of the definitions can come from stdin"));
    }
    let load = |path: &Path| {
        let shown = path.display();
        load(&read(path)?).map_err(|failure| failure.context(&format!("{shown}")))
    };
    write_stdout(&compare::to_text(&compare::compare(
        &load(before)?,
        &load(after)?,
    )))
}

fn is_stdin(path: &Path) -> bool {
    path.as_os_str() == "-"
}

fn read(path: &Path) -> Result<Vec<u8>, Failure> {
    if !is_stdin(path) {
        return std::fs::read(path)
            .map_err(|error| Failure::new(format!("open {}: {error}", path.display())));
    }
    if std::io::stdin().is_terminal() {
        return Err(Failure::new("please pipe LLB definition to stdin"));
    }
    let mut bytes = Vec::new();
    std::io::stdin().lock().read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn decode(bytes: &[u8]) -> Result<Definition, Failure> {
    Definition::decode(bytes).map_err(|error| Failure::new(format!("failed to parse input: {error}")))
}

fn load(bytes: &[u8]) -> Result<Graph, Failure> {
    Graph::load(&decode(bytes)?).map_err(|error| Failure::new(error.to_string()))
}

fn render(bytes: &[u8], dot: bool) -> Result<String, Failure> {
    let ops =
        dump::ops(&decode(bytes)?).map_err(|error| Failure::new(format!("failed to parse op: {error}")))?;
    if dot {
        return Ok(dump::to_dot(&ops));
    }
    dump::to_json_lines(&ops).map_err(|error| Failure::new(error.to_string()))
}

#[cfg(test)]
mod tests {
    use llb::{ImageOptions, MarshalOptions, State};

    use super::*;

    fn file(dir: &Path, arg: &str) -> std::path::PathBuf {
        let state = State::image("alpine", ImageOptions::default())
            .run([arg])
            .done()
            .root();
        let path = dir.join(arg);
        let definition = state.marshal(&MarshalOptions::default()).unwrap();
        std::fs::write(&path, definition.encode_to_vec()).unwrap();
        path
    }

    #[test]
    fn prints_and_loads_files() {
        let dir = tempfile::tempdir().unwrap();
        let path = file(dir.path(), "one");
        let bytes = read(&path).unwrap();
        let json = render(&bytes, false).unwrap();
        assert_eq!(json.lines().count(), 3);
        assert!(json.lines().all(|line| line.starts_with(r#"{"Op":{"#)), "{json}");
        let dot = render(&bytes, true).unwrap();
        assert!(
            dot.starts_with("digraph {\n") && dot.contains(r#"[label="one" shape="box"];"#),
            "{dot}"
        );
        assert_eq!(load(&bytes).unwrap().vertices().len(), 2);
    }

    #[test]
    fn what_is_no_definition_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let failure = read(&dir.path().join("none")).unwrap_err();
        assert!(failure.to_string().starts_with("open "), "{failure}");
        assert!(render(b"\xff\xff", false).is_err() && load(b"\x0a\x01x").is_err());
        let stdin = Path::new("-");
        assert!(diff(stdin, stdin).is_err());
        let path = file(dir.path(), "one");
        std::fs::write(dir.path().join("bad"), b"\x0a\x01x").unwrap();
        let failure = diff(&path, &dir.path().join("bad")).unwrap_err();
        assert!(failure.to_string().contains("bad"), "{failure}");
    }
}
