//! From text to instructions: lines, continuations, comments, heredocs and the words of each instruction.
//!
//! What an instruction's words mean is not known here, see [`crate::instruction`].

mod directive;
mod flags;
mod heredoc;
mod lines;
mod words;

pub(crate) use directive::{check_directive, detect_syntax, directive};
pub(crate) use heredoc::{Heredoc, parse_heredoc, trim_leading_tabs};

use crate::position::{Range, line_ranges};
use crate::text;
use directive::DirectiveReader;
use lines::Lines;

/// The longest line, with its end.
const MAX_LINE: usize = 64 * 1024;

/// Why a text is no Dockerfile.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum SyntaxError {
    #[error("only one {0} parser directive can be used")]
    RepeatedDirective(String),
    #[error("invalid escape token '{0}' does not match ` or \\")]
    EscapeToken(String),
    #[error("when using JSON array syntax, arrays must be comprised of strings only")]
    JsonNotStrings,
    #[error("{0} must have two arguments")]
    TwoArguments(&'static str),
    #[error("Syntax error - can't find = in {}. Must be of the form: name=value", text::quote(.0))]
    NoEquals(String),
    #[error("unterminated heredoc")]
    UnterminatedHeredoc,
    #[error(transparent)]
    Word(#[from] crate::word::WordError),
    #[error("file with no instructions")]
    Empty,
    #[error("dockerfile line greater than max allowed size of {}", MAX_LINE - 1)]
    LongLine,
}

/// A [`SyntaxError`] and where it is.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{error}")]
pub(crate) struct LocatedSyntaxError {
    #[source]
    pub(crate) error: SyntaxError,
    pub(crate) ranges: Vec<Range>,
}

/// One instruction, split into words.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Node {
    /// The instruction's name as written.
    pub(crate) name: String,
    /// The whole logical line.
    pub(crate) original: String,
    /// Words with `--` in front of the arguments.
    pub(crate) flags: Vec<String>,
    /// The arguments; how they are split depends on the instruction.
    pub(crate) args: Vec<String>,
    /// The arguments were a JSON array.
    pub(crate) json: bool,
    /// Documents that follow the line.
    pub(crate) heredocs: Vec<Heredoc>,
    /// First line.
    pub(crate) start_line: u32,
    /// Last line, heredocs included.
    pub(crate) end_line: u32,
    /// Comments directly in front of it.
    pub(crate) comments: Vec<String>,
    /// ONBUILD's instruction may be followed by heredocs.
    child_takes_heredocs: bool,
}

impl Node {
    /// Lists the instruction's lines.
    pub(crate) fn location(&self) -> Vec<Range> {
        line_ranges(self.start_line, self.end_line)
    }

    fn takes_heredocs(&self) -> bool {
        if self.name.eq_ignore_ascii_case("onbuild") && !self.args.is_empty() {
            return self.child_takes_heredocs;
        }
        takes_heredocs(&self.name) && !self.json
    }
}

fn takes_heredocs(name: &str) -> bool {
    ["add", "copy", "run"]
        .iter()
        .any(|known| name.eq_ignore_ascii_case(known))
}

/// A parsed file.
#[derive(Clone, Debug, Default)]
pub(crate) struct File {
    pub(crate) nodes: Vec<Node>,
    pub(crate) escape: char,
    /// Lines at which instructions with empty continuation lines end.
    pub(crate) empty_continuations: Vec<u32>,
}

/// Parses a whole file.
pub(crate) fn parse(text: &str) -> Result<File, LocatedSyntaxError> {
    let mut parser = Parser {
        lines: Lines::new(text),
        directives: DirectiveReader::new("#", 0),
        escape: '\\',
        file: File::default(),
        comments: Vec::new(),
    };
    while parser.instruction()? {}
    let line = parser.lines.count();
    let at = |error| LocatedSyntaxError {
        error,
        ranges: line_ranges(line, 0),
    };
    if parser.file.nodes.is_empty() {
        return Err(at(SyntaxError::Empty));
    }
    if parser.lines.too_long() {
        return Err(at(SyntaxError::LongLine));
    }
    parser.file.escape = parser.escape;
    Ok(parser.file)
}

struct Parser<'a> {
    lines: Lines<'a>,
    directives: DirectiveReader,
    escape: char,
    file: File,
    comments: Vec<String>,
}

impl Parser<'_> {
    /// Reads one logical line; false at the end.
    fn instruction(&mut self) -> Result<bool, LocatedSyntaxError> {
        let before = self.lines.count();
        let Some(raw) = self.lines.next() else {
            return Ok(false);
        };
        let raw = if before == 0 {
            raw.strip_prefix('\u{feff}').unwrap_or(raw)
        } else {
            raw
        };
        let token = lines::trim_newline(raw).trim_start();
        self.comment_or_directive(raw, token)
            .map_err(|error| LocatedSyntaxError {
                error,
                ranges: line_ranges(before, 0),
            })?;
        let start = self.lines.count();
        let token = if lines::is_comment(token) { "" } else { token };
        let (part, ended) = lines::trim_continuation(token, self.escape);
        if ended && part.is_empty() {
            return Ok(true);
        }
        let line = self.continue_line(part, ended);
        self.finish(line, start)?;
        Ok(true)
    }

    /// Remembers a comment, or obeys it if it is a directive.
    fn comment_or_directive(&mut self, raw: &str, token: &str) -> Result<(), SyntaxError> {
        if lines::is_comment(raw) {
            let mut rest = raw.chars();
            rest.next();
            let comment = rest.as_str().trim();
            if comment.is_empty() {
                self.comments.clear();
            } else {
                self.comments.push(comment.to_owned());
            }
        }
        let Some(found) = self.directives.line(token)? else {
            return Ok(());
        };
        if found.name == "escape" {
            match found.value.as_str() {
                "\\" => self.escape = '\\',
                "`" => self.escape = '`',
                _ => return Err(SyntaxError::EscapeToken(found.value)),
            }
        }
        self.comments.pop();
        Ok(())
    }

    /// Appends the lines that continue the first one.
    fn continue_line(&mut self, first: &str, ended: bool) -> String {
        let mut line = first.to_owned();
        let mut ended = ended;
        let mut has_empty = false;
        while !ended {
            let Some(raw) = self.lines.next() else { break };
            if lines::is_comment(raw) {
                continue;
            }
            let token = lines::trim_newline(raw);
            if token.trim_start().is_empty() {
                has_empty = true;
                continue;
            }
            let (part, last) = lines::trim_continuation(token, self.escape);
            line.push_str(part);
            ended = last;
        }
        if has_empty {
            self.file.empty_continuations.push(self.lines.count());
        }
        line
    }

    /// Splits a logical line and reads the heredocs it announces.
    fn finish(&mut self, line: String, start: u32) -> Result<(), LocatedSyntaxError> {
        let end = self.lines.count();
        let located = |error, end| LocatedSyntaxError {
            error,
            ranges: line_ranges(start, end),
        };
        let mut node = words::node(&line, self.escape).map_err(|error| located(error, end))?;
        if node.takes_heredocs() && line.contains("<<") {
            let announced = heredoc::heredocs_of_line(&line).map_err(|error| located(error.into(), end))?;
            for mut document in announced {
                let read = heredoc::read_content(&mut document, &mut self.lines);
                read.map_err(|error| located(error, self.lines.count()))?;
                node.heredocs.push(document);
            }
        }
        node.original = line;
        node.comments = std::mem::take(&mut self.comments);
        node.start_line = start;
        node.end_line = self.lines.count();
        self.file.nodes.push(node);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_continuations_comments_and_directives() {
        let file = parse(
            "# escape=`\n# about base\nFROM x `\n # no\n\n  AS base\nRUN <<A cat <<-B\n1\nA\n\t2\n\tB\n",
        )
        .unwrap();
        assert_eq!(file.escape, '`');
        assert_eq!(file.empty_continuations, [6]);
        assert_eq!(file.nodes[0].args, ["x", "AS", "base"]);
        assert_eq!(file.nodes[0].comments, ["about base"]);
        assert_eq!((file.nodes[0].start_line, file.nodes[0].end_line), (3, 6));
        let run = &file.nodes[1];
        assert_eq!(run.heredocs.len(), 2);
        assert_eq!(run.heredocs[0].content, "1\n");
        assert_eq!(run.heredocs[1].content, "\t2\n");
        assert_eq!(run.end_line, 11);
    }

    #[test]
    fn says_where_it_went_wrong() {
        let err = parse("FROM x\nRUN <<EOF\nx\n").unwrap_err();
        assert_eq!(err.to_string(), "unterminated heredoc");
        assert_eq!(err.ranges, line_ranges(2, 3));
        assert_eq!(parse("# nothing\n\n").unwrap_err().error, SyntaxError::Empty);
        let long = format!("FROM x\nRUN {}\n", "y".repeat(MAX_LINE));
        assert_eq!(
            parse(&long).unwrap_err().to_string(),
            "dockerfile line greater than max allowed size of 65535"
        );
        assert_eq!(
            parse("FROM x\nRUN [\"a\", 1]\n").unwrap_err().to_string(),
            "when using JSON array syntax, arrays must be comprised of strings only"
        );
    }
}
