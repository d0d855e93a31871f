//! From nodes to stages and instructions.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::error::{InstructionError, LocatedInstructionError};
use super::flags::{FlagKind, Flags};
use super::{
    Argument, CommandLine, Copy, InlineFile, InlineSource, Instruction, KeyValue, Kind, MetaArgs, Stage,
    healthcheck, run,
};
use crate::lint::{Linter, rules};
use crate::parser::{Node, parse_heredoc, trim_leading_tabs};
use crate::suggest;
use crate::text::{is_lower, is_upper};

/// A Dockerfile's instructions.
#[derive(Clone, Debug, Default)]
pub(crate) struct Parsed {
    pub(crate) stages: Vec<Stage>,
    /// The ARGs in front of the first stage.
    pub(crate) meta_args: Vec<MetaArgs>,
}

enum Found {
    Stage(Stage),
    Instruction(Instruction),
}

/// Reads all instructions.
pub(crate) fn parse(nodes: Vec<Node>, linter: &Linter) -> Result<Parsed, LocatedInstructionError> {
    let mut parsed = Parsed::default();
    for mut node in nodes {
        let found = parse_node(&mut node, linter);
        let located = |error, line| LocatedInstructionError {
            error,
            line,
            ranges: node.location(),
        };
        let found = found.map_err(|error| located(error, Some(node.start_line)))?;
        match found {
            Found::Stage(stage) => parsed.stages.push(stage),
            Found::Instruction(Instruction {
                kind: Kind::Arg(args),
                location,
                ..
            }) if parsed.stages.is_empty() => {
                parsed.meta_args.push(MetaArgs { args, location });
            }
            Found::Instruction(instruction) => match parsed.stages.last_mut() {
                Some(stage) => stage.instructions.push(Arc::new(instruction)),
                None => return Err(located(InstructionError::NoStage, None)),
            },
        }
    }
    Ok(parsed)
}

/// Reads one instruction of an ONBUILD trigger.
pub(crate) fn parse_trigger(node: &mut Node) -> Result<Instruction, InstructionError> {
    match parse_node(node, &Linter::silent())? {
        Found::Instruction(instruction) => Ok(instruction),
        Found::Stage(_) => Err(InstructionError::NotACommand("*instructions.Stage")),
    }
}

const NAMES: [&str; 18] = [
    "ADD",
    "ARG",
    "CMD",
    "COPY",
    "ENTRYPOINT",
    "ENV",
    "EXPOSE",
    "FROM",
    "HEALTHCHECK",
    "LABEL",
    "MAINTAINER",
    "ONBUILD",
    "RUN",
    "SHELL",
    "STOPSIGNAL",
    "USER",
    "VOLUME",
    "WORKDIR",
];

/// Reads an instruction; moves out of the node what it needs, all but where it is.
fn parse_node(node: &mut Node, linter: &Linter) -> Result<Found, InstructionError> {
    let linter = linter.with_comments(&node.comments);
    let kind = match node.name.to_lowercase().as_str() {
        "from" => return parse_from(node, &linter).map(Found::Stage),
        "env" => {
            no_flags(node)?;
            Kind::Env(key_values(node, "ENV")?)
        }
        "label" => {
            no_flags(node)?;
            Kind::Label(key_values(node, "LABEL")?)
        }
        "maintainer" => {
            linter.run(
                &rules::MAINTAINER_DEPRECATED,
                &node.location(),
                rules::maintainer_deprecated,
            );
            let name = one_argument(node, "MAINTAINER")?;
            no_flags(node)?;
            Kind::Maintainer(name)
        }
        "add" => Kind::Add(parse_add(node)?),
        "copy" => Kind::Copy(parse_copy(node)?),
        "onbuild" => Kind::OnBuild(parse_onbuild(node)?),
        "workdir" => {
            let path = one_argument(node, "WORKDIR")?;
            no_flags(node)?;
            Kind::Workdir(path)
        }
        "run" => Kind::Run(run::parse(node)?),
        "cmd" => {
            no_flags(node)?;
            Kind::Cmd(command_line(node))
        }
        "entrypoint" => {
            no_flags(node)?;
            Kind::Entrypoint(command_line(node))
        }
        "healthcheck" => Kind::Healthcheck(healthcheck::parse(node)?),
        "expose" => {
            let mut ports = arguments(node, "EXPOSE")?;
            no_flags(node)?;
            ports.sort();
            Kind::Expose(ports)
        }
        "user" => {
            let user = one_argument(node, "USER")?;
            no_flags(node)?;
            Kind::User(user)
        }
        "volume" => Kind::Volume(parse_volume(node)?),
        "stopsignal" => Kind::StopSignal(one_argument(node, "STOPSIGNAL")?),
        "arg" => Kind::Arg(parse_arg(node, &linter)?),
        "shell" => Kind::Shell(parse_shell(node)?),
        _ => {
            let error = InstructionError::Unknown(node.name.clone());
            return Err(error.suggest(suggest::search(&node.name, NAMES, true)));
        }
    };
    Ok(Found::Instruction(Instruction {
        code: trimmed(std::mem::take(&mut node.original)),
        name: std::mem::take(&mut node.name),
        location: node.location(),
        comments: std::mem::take(&mut node.comments),
        kind,
    }))
}

fn no_flags(node: &Node) -> Result<(), InstructionError> {
    Flags::parse(&node.flags, &[]).map(|_| ())
}

/// Cuts space off at both ends.
fn trimmed(text: String) -> String {
    match text.trim() {
        cut if cut.len() == text.len() => text,
        cut => cut.to_owned(),
    }
}

fn arguments(node: &mut Node, name: &'static str) -> Result<Vec<String>, InstructionError> {
    if node.args.is_empty() {
        Err(InstructionError::AtLeastOneArgument(name))
    } else {
        Ok(std::mem::take(&mut node.args))
    }
}

fn one_argument(node: &mut Node, name: &'static str) -> Result<String, InstructionError> {
    match node.args.as_mut_slice() {
        [argument] => Ok(std::mem::take(argument)),
        _ => Err(InstructionError::ExactlyOneArgument(name)),
    }
}

fn key_values(node: &mut Node, name: &'static str) -> Result<Vec<KeyValue>, InstructionError> {
    let mut args = arguments(node, name)?;
    let pairs = args.chunks_exact_mut(3).map(|chunk| {
        if chunk[0].is_empty() {
            return Err(InstructionError::BlankName(name));
        }
        Ok(KeyValue {
            key: std::mem::take(&mut chunk[0]),
            value: std::mem::take(&mut chunk[1]),
            legacy: chunk[2].is_empty(),
        })
    });
    pairs.collect()
}

const COPY_FLAGS: [(&str, FlagKind); 6] = [
    ("chmod", FlagKind::Text),
    ("chown", FlagKind::Text),
    ("exclude", FlagKind::Texts),
    ("from", FlagKind::Text),
    ("link", FlagKind::Bool),
    ("parents", FlagKind::Bool),
];

const ADD_FLAGS: [(&str, FlagKind); 7] = [
    ("checksum", FlagKind::Text),
    ("chmod", FlagKind::Text),
    ("chown", FlagKind::Text),
    ("exclude", FlagKind::Texts),
    ("keep-git-dir", FlagKind::Bool),
    ("link", FlagKind::Bool),
    ("unpack", FlagKind::Bool),
];

fn parse_add(node: &Node) -> Result<Copy, InstructionError> {
    copy_of(node, "ADD", &ADD_FLAGS)
}

fn parse_copy(node: &Node) -> Result<Copy, InstructionError> {
    copy_of(node, "COPY", &COPY_FLAGS)
}

fn copy_of(
    node: &Node,
    name: &'static str,
    known: &[(&'static str, FlagKind)],
) -> Result<Copy, InstructionError> {
    let (dest, sources) = match node.args.split_last() {
        Some((dest, sources)) if !sources.is_empty() => (dest, sources),
        _ => return Err(InstructionError::NoDestination(name)),
    };
    let flags = Flags::parse(&node.flags, known)?;
    if parse_heredoc(dest).ok().flatten().is_some() {
        return Err(InstructionError::HeredocDestination(name));
    }
    let mut copy = Copy {
        dest: dest.clone(),
        from: flags.text("from"),
        chown: flags.text("chown"),
        chmod: flags.text("chmod"),
        link: flags.bool("link").unwrap_or_default(),
        excludes: flags.texts("exclude"),
        parents: flags.bool("parents").unwrap_or_default(),
        keep_git_dir: flags.bool("keep-git-dir"),
        checksum: flags.text("checksum"),
        unpack: flags.bool("unpack"),
        ..Copy::default()
    };
    // Of several with the same name the last counts.
    let documents = node
        .heredocs
        .iter()
        .map(|read| (&read.name, read.content.as_str()));
    let documents: BTreeMap<&String, &str> = documents.collect();
    for source in sources {
        let Some(document) = parse_heredoc(source).ok().flatten() else {
            copy.sources.push(source.clone());
            continue;
        };
        let content = documents.get(&document.name).copied().unwrap_or_default();
        let content = if document.chomp {
            trim_leading_tabs(content)
        } else {
            content.to_owned()
        };
        copy.contents.push(InlineSource {
            path: document.name,
            content,
            expand: document.expand,
        });
    }
    Ok(copy)
}

fn parse_from(node: &Node, linter: &Linter) -> Result<Stage, InstructionError> {
    let location = node.location();
    if let [_, keyword, name, rest @ ..] = node.args.as_slice() {
        if rest.is_empty() && !is_lower(name) {
            linter.run(&rules::STAGE_NAME_CASING, &location, || {
                rules::stage_name_casing(name)
            });
        }
        let follows = if is_lower(&node.name) {
            is_lower(keyword)
        } else {
            !is_upper(&node.name) || is_upper(keyword)
        };
        if !follows {
            linter.run(&rules::FROM_AS_CASING, &location, || {
                rules::from_as_casing(&node.name, keyword)
            });
        }
    }
    let name = match node.args.as_slice() {
        [_] => String::new(),
        [_, keyword, name] if keyword.eq_ignore_ascii_case("as") => stage_name(name)?,
        _ => return Err(InstructionError::FromArguments),
    };
    let flags = Flags::parse(&node.flags, &[("platform", FlagKind::Text)])?;
    if !name.is_empty() {
        check_description("FROM", std::slice::from_ref(&name), node, linter);
    }
    Ok(Stage {
        doc_comment: doc_comment(&node.comments, &name),
        name,
        base_name: node.args.first().cloned().unwrap_or_default(),
        platform: flags.text("platform"),
        keyword: node.name.clone(),
        code: node.original.trim().to_owned(),
        location,
        comments: node.comments.clone(),
        instructions: Vec::new(),
    })
}

fn stage_name(written: &str) -> Result<String, InstructionError> {
    let name = written.to_lowercase();
    let good = name.starts_with(|c: char| c.is_ascii_lowercase())
        && name
            .bytes()
            .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || b"-_.".contains(&c));
    if good {
        Ok(name)
    } else {
        Err(InstructionError::StageName(written.to_owned()))
    }
}

/// Returns what a comment `name text` says.
fn doc_comment(comments: &[String], name: &str) -> String {
    if name.is_empty() {
        return String::new();
    }
    let found = comments
        .iter()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    found.unwrap_or_default().to_owned()
}

/// Checks that the comment in front begins with a defined name.
fn check_description(instruction: &str, names: &[String], node: &Node, linter: &Linter) {
    let Some(comment) = node.comments.last() else {
        return;
    };
    let first = comment.split(' ').next().unwrap_or_default();
    if names.is_empty() || names.iter().any(|name| name == first) {
        return;
    }
    let example = if names.len() > 1 { "<arg_key>" } else { &names[0] };
    let message = || rules::invalid_definition_description(instruction, example);
    linter.run(&rules::INVALID_DEFINITION_DESCRIPTION, &node.location(), message);
}

fn parse_onbuild(node: &Node) -> Result<String, InstructionError> {
    let Some(trigger) = node.args.first() else {
        return Err(InstructionError::AtLeastOneArgument("ONBUILD"));
    };
    Flags::parse(&node.flags, &[])?;
    let trigger = trigger.trim().to_uppercase();
    match trigger.as_str() {
        "ONBUILD" => return Err(InstructionError::OnBuildChain),
        "MAINTAINER" | "FROM" => return Err(InstructionError::OnBuildTrigger(trigger)),
        _ => {}
    }
    let is_space = |c: char| matches!(c, '\t' | '\n' | '\u{c}' | '\r' | ' ');
    let line = node.original.trim_start_matches(is_space);
    let has_name = line
        .get(..7)
        .is_some_and(|name| name.eq_ignore_ascii_case("onbuild"));
    let mut expression = if has_name {
        line[7..].trim_start_matches(is_space).to_owned()
    } else {
        node.original.clone()
    };
    for document in &node.heredocs {
        expression.push('\n');
        expression.push_str(&document.content);
        expression.push_str(&document.name);
    }
    Ok(expression)
}

/// The words of a command: as they are in JSON form, else one text.
pub(super) fn command_words(args: Vec<String>, json: bool) -> Vec<String> {
    if json || args.len() < 2 {
        args
    } else {
        vec![args.join(" ")]
    }
}

pub(super) fn command_line(node: &mut Node) -> CommandLine {
    let file = |document: crate::parser::Heredoc| InlineFile {
        name: document.name,
        content: document.content,
        chomp: document.chomp,
    };
    CommandLine {
        args: command_words(std::mem::take(&mut node.args), node.json),
        files: std::mem::take(&mut node.heredocs).into_iter().map(file).collect(),
        prepend_shell: !node.json,
    }
}

fn parse_volume(node: &mut Node) -> Result<Vec<String>, InstructionError> {
    let args = arguments(node, "VOLUME")?;
    Flags::parse(&node.flags, &[])?;
    let volumes = args.iter().map(|volume| match volume.trim() {
        "" => Err(InstructionError::EmptyVolume),
        volume => Ok(volume.to_owned()),
    });
    volumes.collect()
}

fn parse_arg(node: &mut Node, linter: &Linter) -> Result<Vec<Argument>, InstructionError> {
    let args = arguments(node, "ARG")?.into_iter().map(|arg| {
        let (key, value) = match arg.split_once('=') {
            Some(("", _)) => return Err(InstructionError::BlankName("ARG")),
            Some((key, value)) => (key.to_owned(), Some(value.to_owned())),
            None => (arg, None),
        };
        Ok(Argument {
            doc_comment: doc_comment(&node.comments, &key),
            key,
            value,
        })
    });
    let args = args.collect::<Result<Vec<_>, _>>()?;
    let names: Vec<String> = args.iter().map(|arg| arg.key.clone()).collect();
    check_description("ARG", &names, node, linter);
    Ok(args)
}

fn parse_shell(node: &mut Node) -> Result<Vec<String>, InstructionError> {
    Flags::parse(&node.flags, &[])?;
    let words = command_words(std::mem::take(&mut node.args), node.json);
    if words.is_empty() {
        return Err(InstructionError::AtLeastOneArgument("SHELL"));
    }
    if node.json {
        Ok(words)
    } else {
        Err(InstructionError::NotJson("SHELL"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse_text(dockerfile: &str) -> Result<Parsed, String> {
        let file = crate::parser::parse(dockerfile).map_err(|err| err.to_string())?;
        parse(file.nodes, &Linter::silent()).map_err(|err| err.to_string())
    }

    #[test]
    fn words_errors_as_buildkit_does() {
        for (dockerfile, wanted) in [
            (
                "FORM x",
                "dockerfile parse error on line 1: unknown instruction: FORM (did you mean FROM?)",
            ),
            ("RUN x", "no build stage in current context"),
            (
                "FROM x y",
                "dockerfile parse error on line 1: FROM requires either one or three arguments",
            ),
            (
                "FROM x AS 1",
                "dockerfile parse error on line 1: invalid name for build stage: \"1\", name can't start with a number or contain symbols",
            ),
            (
                "FROM x\nCOPY --chmo=1 a b",
                "dockerfile parse error on line 2: unknown flag: --chmo (did you mean chmod?)",
            ),
            (
                "FROM x\nCOPY a",
                "dockerfile parse error on line 2: COPY requires at least two arguments, but only one was provided. Destination could not be determined",
            ),
            (
                "FROM x\nRUN --mount=type=bnd x\nRUN --mount=from=$x y",
                "dockerfile parse error on line 3: 'from' doesn't support variable expansion, define alias stage instead",
            ),
            (
                "FROM x\nRUN --network=x y",
                "dockerfile parse error on line 2: invalid network mode \"x\"",
            ),
            (
                "FROM x\nHEALTHCHECK --interval=1us CMD y",
                "dockerfile parse error on line 2: Interval \"interval\" cannot be less than 1ms",
            ),
            (
                "FROM x\nONBUILD FROM y",
                "dockerfile parse error on line 2: FROM isn't allowed as an ONBUILD trigger",
            ),
            (
                "FROM x\nSHELL a",
                "dockerfile parse error on line 2: SHELL requires the arguments to be in JSON form",
            ),
            (
                "FROM x\nUSER",
                "dockerfile parse error on line 2: USER requires exactly one argument",
            ),
        ] {
            assert_eq!(
                parse_text(dockerfile).map(|_| ()),
                Err(wanted.to_owned()),
                "{dockerfile}"
            );
        }
    }

    #[test]
    fn reads_stages() {
        let parsed = parse_text(
            "# V the version\nARG V=1\nFROM a AS Base\nCOPY <<A <<-\"B\" /x/\n1\nA\n\t2\nB\nFROM base\n",
        )
        .unwrap();
        assert_eq!(parsed.meta_args[0].args[0].doc_comment, "the version");
        assert_eq!(parsed.stages[0].name, "base");
        let Kind::Copy(copy) = &parsed.stages[0].instructions[0].kind else {
            panic!("COPY expected")
        };
        assert_eq!(
            copy.contents[1],
            InlineSource {
                path: "B".into(),
                content: "2\n".into(),
                expand: false
            }
        );
        assert!(copy.sources.is_empty());
    }
}
