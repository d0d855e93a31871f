//! Documents that follow an instruction's line.

use super::SyntaxError;
use super::lines::{Lines, trim_newline};
use crate::word::{Lexer, NoVariables, WordError};

/// A document, `<<NAME` on the instruction's line.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Heredoc {
    /// The word that ends it.
    pub(crate) name: String,
    /// Variables in it are expanded: no part of the word was quoted.
    pub(crate) expand: bool,
    /// Leading tabs do not count (`<<-`).
    pub(crate) chomp: bool,
    /// The text, line ends included, leading tabs as well.
    pub(crate) content: String,
}

/// Reads a word such as `<<EOF`, `3<<-"EOF"`; nothing if it is not one.
pub(crate) fn parse_heredoc(word: &str) -> Result<Option<Heredoc>, WordError> {
    let Some((chomp, rest)) = split(word) else {
        return Ok(None);
    };
    let mut lexer = Lexer::new('\\');
    lexer.skip_unset = true;
    let words = lexer.words(rest, &NoVariables)?;
    let [name] = words.as_slice() else { return Ok(None) };
    lexer.raw_quotes = true;
    let raw = lexer.words(rest, &NoVariables)?;
    let [raw] = raw.as_slice() else {
        return Err(WordError::Heredoc(rest.to_owned()));
    };
    let quotes = |text: &str| text.chars().filter(|c| matches!(c, '\'' | '"')).count();
    Ok(Some(Heredoc {
        name: name.clone(),
        expand: quotes(name) == quotes(raw),
        chomp,
        content: String::new(),
    }))
}

/// Splits an optional descriptor, `<<`, an optional `-` and spaces off; nothing without a name.
fn split(word: &str) -> Option<(bool, &str)> {
    let rest = word
        .trim_start_matches(|c: char| c.is_ascii_digit())
        .strip_prefix("<<")?;
    let (chomp, rest) = rest.strip_prefix('-').map_or((false, rest), |rest| (true, rest));
    let rest = rest.trim_start_matches(['\t', '\n', '\u{c}', '\r', ' ']);
    (!rest.is_empty() && !rest.contains('<')).then_some((chomp, rest))
}

/// Lists the documents a line announces.
pub(super) fn heredocs_of_line(line: &str) -> Result<Vec<Heredoc>, WordError> {
    let mut lexer = Lexer::new('\\');
    lexer.raw_quotes = true;
    lexer.raw_escapes = true;
    lexer.skip_unset = true;
    let words = lexer.words(line, &NoVariables).unwrap_or_default();
    let mut documents = Vec::new();
    for word in words.iter().filter(|word| word.contains("<<")) {
        documents.extend(parse_heredoc(word)?);
    }
    Ok(documents)
}

/// Reads lines up to the document's end.
pub(super) fn read_content(document: &mut Heredoc, lines: &mut Lines<'_>) -> Result<(), SyntaxError> {
    while let Some(line) = lines.next() {
        let end = trim_newline(line);
        let end = if document.chomp {
            end.trim_start_matches('\t')
        } else {
            end
        };
        if end == document.name {
            return Ok(());
        }
        document.content.push_str(line);
    }
    Err(SyntaxError::UnterminatedHeredoc)
}

/// Removes leading tabs from every line.
pub(crate) fn trim_leading_tabs(content: &str) -> String {
    content
        .split_inclusive('\n')
        .map(|line| line.trim_start_matches('\t'))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn recognizes_heredoc_words() {
        let parse = |word| {
            parse_heredoc(word)
                .unwrap()
                .map(|found| (found.name, found.expand, found.chomp))
        };
        assert_eq!(parse("<<EOF"), Some(("EOF".into(), true, false)));
        assert_eq!(parse("3<<-\"EOF\""), Some(("EOF".into(), false, true)));
        assert_eq!(parse("<< 'a b'"), Some(("a b".into(), false, false)));
        assert_eq!(parse("<<<x"), None);
        assert_eq!(parse("<<"), None);
        assert_eq!(parse("x<<y"), None);
        assert_eq!(heredocs_of_line("RUN cat <<A '<<B' \"<<C\"").unwrap().len(), 1);
        assert_eq!(trim_leading_tabs("\t\ta\n\n\tb"), "a\n\nb");
    }
}
