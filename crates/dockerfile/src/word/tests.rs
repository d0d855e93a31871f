//! Facts of the ecosystem's shell words.

use std::collections::BTreeMap;

use super::*;

impl Variables for BTreeMap<&str, &str> {
    fn get(&self, name: &str) -> Option<&str> {
        BTreeMap::get(self, name).copied()
    }

    fn names(&self) -> Vec<&str> {
        self.keys().copied().collect()
    }
}

fn variables() -> BTreeMap<&'static str, &'static str> {
    BTreeMap::from([
        ("FOO", "xxyy"),
        ("EMPTY", ""),
        ("URL", "http://a/b*/c"),
        ("WORDS", "a b"),
    ])
}

fn expand(word: &str) -> Result<String, String> {
    let (expanded, result) = Lexer::new('\\').expand(word, &variables());
    result.map(|()| expanded.text).map_err(|err| err.to_string())
}

#[test]
fn expands() {
    for (word, wanted) in [
        ("a$FOO-${FOO}", "axxyy-xxyy"),
        ("'$FOO' \"$FOO\"", "$FOO xxyy"),
        ("\\$FOO \\a", "$FOO a"),
        ("\"\\$FOO \\a \\\"\"", "$FOO \\a \""),
        ("$", "$"),
        ("$.", "$."),
        ("$1a", "a"),
        ("${NO}", ""),
        ("${NO-x}${EMPTY-x}${EMPTY:-x}", "xx"),
        ("${NO+x}${EMPTY+y}${EMPTY:+x}${FOO:+z}", "yz"),
        ("${NO:-${FOO}}", "xxyy"),
        ("${FOO?bad}${EMPTY?bad}", "xxyy"),
        ("${FOO#x}", "xyy"),
        ("${FOO#*x}", "xyy"),
        ("${FOO##*x}", "yy"),
        ("${FOO%y}", "xxy"),
        ("${FOO%%y*}", "xx"),
        ("${FOO%y*}", "xxy"),
        ("${FOO%x}", "xxyy"),
        ("${FOO#*}", "xxyy"),
        ("${FOO##*}", ""),
        ("${FOO/x/z}", "zxyy"),
        ("${FOO//x/z}", "zzyy"),
        ("${FOO//x*/z}", "z"),
        ("${URL/http:\\/\\//}", "a/b*/c"),
        ("${URL//\\*\\//-}", "http://a/b-c"),
        ("${FOO/$EMPTY/w}", "wxxyy"),
        ("${FOO//$EMPTY/w}", "wxwxwywyw"),
        ("é${FOO}é", "éxxyyé"),
    ] {
        assert_eq!(expand(word).as_deref(), Ok(wanted), "{word}");
    }
}

#[test]
fn refuses() {
    for (word, wanted) in [
        (
            "'a",
            "failed to process \"'a\": unexpected end of statement while looking for matching single-quote",
        ),
        (
            "\"a",
            "failed to process \"\\\"a\": unexpected end of statement while looking for matching double-quote",
        ),
        ("${", "failed to process \"${\": syntax error: missing '}'"),
        ("${}", "failed to process \"${}\": syntax error: bad substitution"),
        (
            "${FOO",
            "failed to process \"${FOO\": unsupported modifier (\u{fffd}) in substitution",
        ),
        (
            "${FOO-a",
            "failed to process \"${FOO-a\": syntax error: missing '}'",
        ),
        (
            "${FOO:=a}",
            "failed to process \"${FOO:=a}\": unsupported modifier (:=) in substitution",
        ),
        (
            "${FOO:#a}",
            "failed to process \"${FOO:#a}\": unsupported modifier (:#) in substitution",
        ),
        (
            "${NO?}",
            "failed to process \"${NO?}\": NO: is not allowed to be unset",
        ),
        (
            "${EMPTY:?no way}",
            "failed to process \"${EMPTY:?no way}\": EMPTY: no way",
        ),
        (
            "${FOO//x}",
            "failed to process \"${FOO//x}\": syntax error: missing '/' in ${}",
        ),
    ] {
        assert_eq!(expand(word), Err(wanted.to_owned()), "{word}");
    }
}

#[test]
fn splits_words() {
    let words = |word: &str| Lexer::new('\\').words(word, &variables()).unwrap();
    assert_eq!(
        words("a  'b c' $WORDS \"$WORDS\" d\\ e"),
        ["a", "b c", "a", "b", "a b", "d e"]
    );
    assert_eq!(words("<< EOF x<y"), ["<< EOF", "x<y"]);
}

#[test]
fn remembers_what_was_used() {
    let (found, _) = Lexer::new('\\').expand("$FOO ${NO:-$EMPTY}", &variables());
    assert_eq!(
        found.matched,
        BTreeSet::from(["FOO".to_owned(), "EMPTY".to_owned()])
    );
    assert_eq!(found.unmatched, BTreeSet::from(["NO".to_owned()]));
}

#[test]
fn keeps_what_is_asked_to_stay() {
    let mut lexer = Lexer::new('\\');
    lexer.raw_quotes = true;
    lexer.skip_unset = true;
    let (found, _) = lexer.expand("echo \"$FOO\" '$x' ${NO:-a} $NO", &variables());
    assert_eq!(found.text, "echo \"xxyy\" '$x' ${NO:-a} $NO");
    let mut lexer = Lexer::new('\\');
    lexer.skip_quotes = true;
    assert_eq!(
        lexer.expand("it's \"$FOO\"", &variables()).0.text,
        "it's \"xxyy\""
    );
}

#[test]
fn hostile_words_are_cheap() {
    let deep = "${NO:-".repeat(100_000);
    assert!(Lexer::new('\\').expand(&deep, &variables()).1.is_err());
    let stars = format!("${{FOO#{}x}}", "*a".repeat(100_000));
    assert!(Lexer::new('\\').expand(&stars, &variables()).1.is_ok());
}
