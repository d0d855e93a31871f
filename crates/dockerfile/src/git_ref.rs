//! Git repositories as ADD and build contexts name them: `https://host/repo.git?branch=x#ref:dir`, `git@host:repo`, ….

use std::collections::BTreeMap;

use llb::{GitOptions, GitUrl};

use crate::text::{self, quote};

/// A place in a Git repository.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct GitRef {
    /// What to hand to Git.
    pub(crate) remote: String,
    /// Commit, tag or branch.
    pub(crate) reference: String,
    /// A commit the reference must be.
    pub(crate) checksum: String,
    pub(crate) subdir: String,
    /// `github.com/…` without a scheme: could be a local path as well.
    pub(crate) like_local: bool,
    pub(crate) keep_git_dir: Option<bool>,
    pub(crate) submodules: Option<bool>,
    pub(crate) mtime: String,
    pub(crate) fetch_by_commit: bool,
}

/// Why something that is a Git repository is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum GitRefError {
    #[error("query {} has no value", quote(.0))]
    NoValue(String),
    #[error("query {} has multiple values", quote(.0))]
    MultipleValues(String),
    #[error("unexpected query {}", quote(.0))]
    UnknownQuery(String),
    #[error("{what} conflicts: {} vs {}", quote(.one), quote(.two))]
    Conflict {
        what: &'static str,
        one: String,
        two: String,
    },
    #[error("branch conflicts with tag")]
    BranchAndTag,
    #[error("invalid {key} value: {}", quote(.value))]
    Bool { key: String, value: String },
    #[error("invalid mtime value: {} (must be \"checkout\" or \"commit\")", quote(.0))]
    MTime(String),
}

impl GitRef {
    /// Parses a name; `None` if it is not that of a Git repository.
    pub(crate) fn parse(text: &str) -> Option<Result<Self, GitRefError>> {
        if text.starts_with("./") || text.starts_with("../") {
            return None;
        }
        let like_local = text.starts_with("github.com/");
        let url = if like_local {
            GitUrl::parse(&format!("https://{text}"))
        } else {
            GitUrl::parse(text)
        }
        .ok()?;
        if !like_local && matches!(url.scheme.as_str(), "http" | "https") && !url.path.ends_with(".git") {
            return None;
        }
        let remote = match url.remote.split_once("://") {
            Some((_, rest)) if like_local => rest.to_owned(),
            _ => url.remote.clone(),
        };
        let (reference, subdir) = url.fragment.clone().unwrap_or_default();
        let mut found = Self {
            remote,
            reference,
            subdir,
            like_local,
            ..Self::default()
        };
        Some(found.load_query(&url.query).map(|()| found))
    }

    fn load_query(&mut self, query: &[(String, String)]) -> Result<(), GitRefError> {
        let mut values: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for (key, value) in query {
            values.entry(key).or_default().push(value);
        }
        let (mut tag, mut branch) = (String::new(), String::new());
        for (key, values) in values {
            let [value] = values[..] else {
                return Err(GitRefError::MultipleValues(key.to_owned()));
            };
            let is_switch = matches!(key, "submodules" | "keep-git-dir" | "fetch-by-commit");
            if value.is_empty() && !is_switch {
                return Err(GitRefError::NoValue(key.to_owned()));
            }
            let switch = || {
                let parsed = if value.is_empty() {
                    Some(true)
                } else {
                    text::parse_bool(value)
                };
                parsed.ok_or_else(|| GitRefError::Bool {
                    key: key.to_owned(),
                    value: value.to_owned(),
                })
            };
            match key {
                "ref" => agree("ref", &mut self.reference, value)?,
                "tag" => value.clone_into(&mut tag),
                "branch" => value.clone_into(&mut branch),
                "subdir" => agree("subdir", &mut self.subdir, value)?,
                "checksum" | "commit" => value.clone_into(&mut self.checksum),
                "keep-git-dir" => self.keep_git_dir = Some(switch()?),
                "submodules" => self.submodules = Some(switch()?),
                "fetch-by-commit" => self.fetch_by_commit = switch()?,
                "mtime" if matches!(value, "checkout" | "commit") => value.clone_into(&mut self.mtime),
                "mtime" => return Err(GitRefError::MTime(value.to_owned())),
                _ => return Err(GitRefError::UnknownQuery(key.to_owned())),
            }
        }
        if !tag.is_empty() {
            agree("ref", &mut self.reference, &with_prefix("refs/tags/", &tag))?;
        }
        if !branch.is_empty() {
            if !tag.is_empty() {
                return Err(GitRefError::BranchAndTag);
            }
            agree("ref", &mut self.reference, &with_prefix("refs/heads/", &branch))?;
        }
        Ok(())
    }

    /// Returns the options of a source for this place; `.git` is left to the caller.
    pub(crate) fn options(&self) -> GitOptions {
        GitOptions {
            reference: self.reference.clone(),
            subdir: self.subdir.clone(),
            checksum: self.checksum.clone(),
            skip_submodules: self.submodules == Some(false),
            ..GitOptions::default()
        }
    }
}

fn with_prefix(prefix: &str, name: &str) -> String {
    if name.starts_with(prefix) {
        name.to_owned()
    } else {
        format!("{prefix}{name}")
    }
}

fn agree(what: &'static str, have: &mut String, value: &str) -> Result<(), GitRefError> {
    if !have.is_empty() && have != value {
        return Err(GitRefError::Conflict {
            what,
            one: have.clone(),
            two: value.to_owned(),
        });
    }
    value.clone_into(have);
    Ok(())
}

/// Tells whether ADD takes a source for a Git repository.
pub(crate) fn is_git(source: &str) -> bool {
    matches!(GitRef::parse(source), Some(Ok(_)))
}

/// Tells whether ADD takes a source for a file on a web server.
pub(crate) fn is_http(source: &str) -> bool {
    (source.starts_with("http://") || source.starts_with("https://")) && !is_git(source)
}

/// Returns the file name of a URL, or a placeholder if it has none or cannot be parsed.
pub(crate) fn url_file_name(url: &str) -> String {
    let parsed = GitUrl::parse(url);
    let name = parsed.as_ref().map_or(".", |url| oci::path::base(&url.path));
    if matches!(name, "." | "/") {
        "__unnamed__".to_owned()
    } else {
        name.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_git_refs() {
        let parse = |text| GitRef::parse(text).unwrap().unwrap();
        let found = parse("https://github.com/foo/bar.git#baz/qux:quux/quuz");
        assert_eq!(
            (found.remote.as_str(), found.reference.as_str()),
            ("https://github.com/foo/bar.git", "baz/qux")
        );
        assert_eq!(found.subdir, "quux/quuz");
        let found = parse("github.com/foo/bar");
        assert!(found.like_local && found.remote == "github.com/foo/bar");
        assert_eq!(
            parse("git@github.com:foo/bar.git?tag=v1").reference,
            "refs/tags/v1"
        );
        assert_eq!(GitRef::parse("https://host/file.tar"), None);
        assert_eq!(GitRef::parse("dir"), None);
        let err = GitRef::parse("https://a/b.git?x=1").unwrap().unwrap_err();
        assert_eq!(err.to_string(), "unexpected query \"x\"");
        assert_eq!(url_file_name("https://a/b/c%20d.tar?x#y"), "c d.tar");
        assert_eq!(url_file_name("https://a/"), "__unnamed__");
        assert_eq!(url_file_name("https://a"), "__unnamed__");
    }
}
