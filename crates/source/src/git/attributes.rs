//! What a `git://` vertex asks for, and how that identifies it.

use build::error::BuildError;
use llb::{GitUrl, pb};

use super::bundle;
use super::remote::Resolved;
use super::signed::Demand;
use crate::image_blob::BlobLocation;
use crate::percent;

/// Stands for what is not shown.
const MASK: &str = "xxxxx";

/// The vertex's identifier and attributes, read.
#[derive(Clone, Debug, Default)]
pub(super) struct Attributes {
    /// What Git is told to fetch from. May hold a password: show [`Attributes::shown_remote`].
    pub remote: String,
    /// Branch, tag, full name of a ref, or commit; empty: the default branch.
    pub reference: String,
    /// What the commit or the tag object must begin with; empty: anything.
    pub checksum: String,
    /// The directory of the repository that is wanted, clean and relative; empty: all.
    pub subdir: String,
    /// Secret with a token for HTTP.
    pub token_secret: String,
    /// Secret with an `Authorization` header's value for HTTP.
    pub header_secret: String,
    /// Lines for `known_hosts`; empty: any host is trusted.
    pub known_hosts: String,
    /// Agent of the client that SSH may use; empty: none.
    pub agent: String,
    /// The bundle that commits are taken from in place of the remote.
    pub bundle: Option<BlobLocation>,
    /// By what the commit or tag must be signed.
    pub demand: Option<Demand>,
    /// What is different from an ordinary checkout.
    pub options: Options,
}

/// What a bundle is named with, spread over several attributes.
#[derive(Debug, Default)]
struct BundleText {
    locator: String,
    session: String,
    layout: String,
}

/// What is different from an ordinary checkout.
#[derive(Clone, Copy, Debug, Default)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is an attribute of the protocol"
)]
pub(super) struct Options {
    /// Keep `.git`.
    pub keep_git_dir: bool,
    /// Leave submodules out.
    pub skip_submodules: bool,
    /// Give all files the commit's time.
    pub commit_time: bool,
    /// Fetch the commit of `checksum` whatever the ref points to.
    pub fetch_by_commit: bool,
    /// Make a bundle of the commit and its history instead of its files.
    pub as_bundle: bool,
}

impl Attributes {
    pub fn read(source: &pb::SourceOp) -> Result<Self, BuildError> {
        let rest = source
            .identifier
            .strip_prefix("git://")
            .unwrap_or(&source.identifier);
        let url = parse(rest)?;
        let (reference, subdir) = url.fragment.unwrap_or_default();
        let mut this = Self {
            remote: url.remote,
            reference,
            subdir,
            ..Self::default()
        };
        let mut bundle = BundleText::default();
        for (key, value) in &source.attrs {
            match key.as_str() {
                llb::attr::GIT_BUNDLE => bundle.locator.clone_from(value),
                llb::attr::OCI_LAYOUT_SESSION_ID => bundle.session.clone_from(value),
                llb::attr::OCI_LAYOUT_STORE_ID => bundle.layout.clone_from(value),
                _ => this.set(key, value)?,
            }
        }
        if this.reference.starts_with('-') || this.reference.bytes().any(|byte| byte.is_ascii_control()) {
            return Err(invalid_ref(&this.reference));
        }
        if !this.checksum.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            let text = format!(
                "invalid checksum {} for Git URL, expected hex commit hash",
                this.checksum
            );
            return Err(BuildError::user(text));
        }
        this.set_bundle(bundle)?;
        Ok(this)
    }

    fn set_bundle(&mut self, text: BundleText) -> Result<(), BuildError> {
        if !text.locator.is_empty() {
            if self.checksum.is_empty() {
                return Err(BuildError::user("git.bundle requires git.checksum to be set"));
            }
            let session = Some(text.session).filter(|session| !session.is_empty());
            self.bundle = Some(bundle::locate(&text.locator, session, text.layout)?);
        }
        let refused = match self.options {
            Options {
                as_bundle: true,
                keep_git_dir: true,
                ..
            } => "git.keepgitdir",
            Options { as_bundle: true, .. } if !self.subdir.is_empty() => "git.subdir",
            _ => return Ok(()),
        };
        let text = format!("git.checkoutbundle is incompatible with {refused}");
        Err(BuildError::user(text))
    }

    fn set(&mut self, key: &str, value: &str) -> Result<(), BuildError> {
        let flag = value == "true";
        match key {
            "git.fullurl" => self.remote = full_url(value)?,
            "git.keepgitdir" => self.options.keep_git_dir = flag,
            "git.skipsubmodules" => self.options.skip_submodules = flag,
            "git.fetchbycommit" => self.options.fetch_by_commit = flag,
            "git.authheadersecret" => value.clone_into(&mut self.header_secret),
            "git.authtokensecret" => value.clone_into(&mut self.token_secret),
            "git.knownsshhosts" => value.clone_into(&mut self.known_hosts),
            "git.mountsshsock" => value.clone_into(&mut self.agent),
            "git.checksum" => value.clone_into(&mut self.checksum),
            "git.mtime" => {
                self.options.commit_time = match value {
                    "" | "checkout" => false,
                    "commit" => true,
                    _ => return Err(BuildError::user(format!("invalid git.mtime {value:?}"))),
                };
            }
            "git.checkoutbundle" => self.options.as_bundle = flag,
            _ => {
                if let Some(name) = key.strip_prefix("git.sig.") {
                    self.set_demand(name, value)?;
                }
            }
        }
        Ok(())
    }

    fn set_demand(&mut self, name: &str, value: &str) -> Result<(), BuildError> {
        let flag = value == "true";
        let demand = self.demand.get_or_insert_default();
        match name {
            "pubkey" => value.clone_into(&mut demand.public_key),
            "rejectexpired" => demand.reject_expired = flag,
            "requiresignedtag" => demand.requires_tag = flag,
            "ignoresignedtag" => demand.ignores_tag = flag,
            // A demand that is not understood is not ignored.
            _ => {
                let text = format!("git.sig.{name}: there is no such demand on signatures");
                return Err(BuildError::user(text));
            }
        }
        Ok(())
    }

    /// The source's identifier as policies know it, made of what is really fetched.
    pub fn identifier(&self) -> String {
        let place = match GitUrl::parse(&self.remote) {
            Ok(url) => format!("{}{}", url.host, oci::path::join(&["/", &url.path])),
            Err(_) => self.remote.clone(),
        };
        match (self.reference.as_str(), self.subdir.as_str()) {
            ("", "") => format!("git://{place}"),
            (reference, "") => format!("git://{place}#{reference}"),
            (reference, subdir) => format!("git://{place}#{reference}:{subdir}"),
        }
    }

    /// The remote without credentials, for people.
    pub fn shown_remote(&self) -> String {
        shown(&self.remote)
    }

    /// What has to be known without asking the remote, if anything is.
    pub fn pinned(&self) -> Result<Option<Resolved>, BuildError> {
        if is_commit(&self.reference) {
            self.check(&self.reference, None)?;
            return Ok(Some(Resolved::commit(&self.reference, &self.reference)));
        }
        if self.bundle.is_some() {
            if !self.reference.is_empty() {
                return Ok(None);
            }
            if !is_commit(&self.checksum) {
                let text = format!(
                    "git.bundle without a ref requires a full commit hash as git.checksum, got {:?}",
                    self.checksum
                );
                return Err(BuildError::user(text));
            }
            return Ok(Some(Resolved::commit(&self.checksum, &self.checksum)));
        }
        if !self.options.fetch_by_commit {
            return Ok(None);
        }
        if self.checksum.is_empty() {
            return Err(BuildError::user(
                "fetch-by-commit requires a checksum or a commit SHA ref",
            ));
        }
        if !is_commit(&self.checksum) {
            let text = format!(
                "fetch-by-commit requires a full commit SHA checksum, got {:?}",
                self.checksum
            );
            return Err(BuildError::user(text));
        }
        // Names that are not full are branches here: nobody is asked whether they are tags.
        let reference = match self.reference.as_str() {
            "" => self.checksum.clone(),
            full if full.starts_with("refs/") => full.to_owned(),
            branch => format!("refs/heads/{branch}"),
        };
        Ok(Some(Resolved::commit(&reference, &self.checksum)))
    }

    /// Compares with the pinned checksum, which may be that of a tag object or of the commit it points to.
    pub fn check(&self, checksum: &str, commit: Option<&str>) -> Result<(), BuildError> {
        let is_match = |text: &str| text.starts_with(&self.checksum);
        if is_match(checksum) || commit.is_some_and(is_match) {
            return Ok(());
        }
        let got = match commit.filter(|commit| *commit != checksum) {
            Some(commit) => format!("{checksum} or {commit}"),
            None => checksum.to_owned(),
        };
        Err(BuildError::user(format!(
            "expected checksum to match {}, got {got}",
            self.checksum
        )))
    }

    /// The source's key, as BuildKit makes it.
    pub fn key(&self, resolved: &Resolved) -> String {
        let keep = self.options.keep_git_dir;
        // Without `.git` a tag object and its commit look the same.
        let mut key = match &resolved.commit {
            Some(commit) if !keep => commit.clone(),
            _ => resolved.checksum.clone(),
        };
        if keep {
            key.push_str(".git#");
            key.push_str(&resolved.reference);
        }
        if !self.subdir.is_empty() {
            key.push(':');
            key.push_str(&self.subdir);
        }
        if self.options.skip_submodules {
            key.push_str("(skip-submodules)");
        }
        if self.options.commit_time {
            key.push_str("(mtime=commit)");
        }
        if self.options.as_bundle {
            // Further than BuildKit goes: a bundle shows the ref's name, so bundles of two names are not the same.
            key.push_str("(bundle)");
            key.push_str(&bundle::target_ref(&self.reference));
        }
        key
    }

    /// Under what a checkout is found again.
    pub fn snapshot_index(&self, resolved: &Resolved) -> String {
        format!("git-snapshot::{}:{}", self.key(resolved), self.subdir)
    }

    /// Under what the remote's repository is kept. A remote with a password is named by its digest: the password has no
    /// place in the database.
    pub fn remote_index(&self) -> String {
        if self.credentials().is_some() {
            format!("git-remote::{}", oci::Digest::sha256(self.remote.as_bytes()))
        } else {
            format!("git-remote::{}", self.remote)
        }
    }

    /// User and password that an HTTP remote's URL holds.
    pub fn credentials(&self) -> Option<(String, String)> {
        self.http_host()?;
        let (user, _) = authority(&self.remote)?.rsplit_once('@')?;
        let (user, password) = user.split_once(':')?;
        Some((percent::decoded(user), percent::decoded(password)))
    }

    /// The remote as Git gets it: what it runs shows URLs in its arguments, so credentials go another way.
    pub fn plain_remote(&self) -> String {
        if self.credentials().is_some() {
            without_user(&self.remote)
        } else {
            self.remote.clone()
        }
    }

    /// Host and port of an HTTP remote.
    pub fn http_host(&self) -> Option<&str> {
        if !self.remote.starts_with("http://") && !self.remote.starts_with("https://") {
            return None;
        }
        let authority = authority(&self.remote)?;
        Some(authority.rsplit_once('@').map_or(authority, |(_, host)| host))
    }
}

fn parse(text: &str) -> Result<GitUrl, BuildError> {
    let parsed = match GitUrl::parse(text) {
        Err(llb::GitUrlError::UnknownProtocol | llb::GitUrlError::InvalidProtocol(_)) => {
            GitUrl::parse(&format!("https://{text}"))
        }
        parsed => parsed,
    };
    parsed.map_err(|error| BuildError::user(error.to_string()))
}

/// The remote of an attribute: unlike the identifier it is not split.
fn full_url(text: &str) -> Result<String, BuildError> {
    match GitUrl::parse(text) {
        Ok(_) if text.bytes().any(|byte| byte.is_ascii_control()) => {
            Err(BuildError::user(format!("invalid git.fullurl {:?}", shown(text))))
        }
        Ok(_) => Ok(text.to_owned()),
        Err(_) => parse(text).map(|url| url.remote),
    }
}

/// Makes the error of a ref that Git could take for something else.
pub(super) fn invalid_ref(reference: &str) -> BuildError {
    BuildError::user(format!("invalid git ref {reference:?}"))
}

/// Whether a text is a whole commit hash.
pub(super) fn is_commit(text: &str) -> bool {
    matches!(text.len(), 40 | 64) && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

fn authority(url: &str) -> Option<&str> {
    let (_, rest) = url.split_once("://")?;
    rest.split('/').next()
}

fn without_user(url: &str) -> String {
    let Some((scheme, rest)) = url.split_once("://") else {
        return url.to_owned();
    };
    let end = rest.find('/').unwrap_or(rest.len());
    let (authority, path) = rest.split_at(end);
    let host = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
    format!("{scheme}://{host}{path}")
}

/// A URL without what may be secret.
fn shown(url: &str) -> String {
    let Some((scheme, rest)) = url.split_once("://") else {
        return url.to_owned();
    };
    let end = rest.find('/').unwrap_or(rest.len());
    let (authority, path) = rest.split_at(end);
    let Some((user, host)) = authority.rsplit_once('@') else {
        return url.to_owned();
    };
    match user.split_once(':') {
        Some(("", _)) => format!("{scheme}://:{MASK}@{host}{path}"),
        Some(_) => format!("{scheme}://{MASK}:{MASK}@{host}{path}"),
        None if user.is_empty() => url.to_owned(),
        None => format!("{scheme}://{MASK}@{host}{path}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHA: &str = "0123456789abcdef0123456789abcdef01234567";

    fn read(identifier: &str, attrs: &[(&str, &str)]) -> Result<Attributes, BuildError> {
        let attrs = attrs
            .iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
            .collect();
        Attributes::read(&pb::SourceOp {
            identifier: identifier.to_owned(),
            attrs,
        })
    }

    #[test]
    fn splits_identifiers() {
        let read = |text: &str| {
            let found = read(text, &[]).expect("is valid");
            (found.remote, found.reference, found.subdir)
        };
        let is = |a: &str, b: &str, c: &str| (a.to_owned(), b.to_owned(), c.to_owned());
        assert_eq!(read("git://github.com/a/b"), is("https://github.com/a/b", "", ""));
        assert_eq!(
            read("git://github.com/a/b#v1:x/../y/"),
            is("https://github.com/a/b", "v1", "y")
        );
        assert_eq!(read("git://git://h/b.git#:d"), is("git://h/b.git", "", "d"));
        assert_eq!(
            read("git://ssh://git@h:22/b.git"),
            is("ssh://git@h:22/b.git", "", "")
        );
        assert_eq!(read("git://git@h:b.git#x"), is("git@h:b.git", "x", ""));
    }

    #[test]
    fn a_full_url_never_reaches_the_disk() {
        let remote = |url: &str| read("git://x/y", &[("git.fullurl", url)]).map(|found| found.remote);
        assert_eq!(remote("http://h/b.git").expect("is valid"), "http://h/b.git");
        assert_eq!(remote("file:///etc").expect("is no file"), "https://file:///etc");
        assert!(remote("http://h/\nx").is_err());
    }

    #[test]
    fn refuses_by_name() {
        let refused = |key: &str, value: &str| {
            let error = read("git://x/y", &[(key, value)])
                .expect_err("is refused")
                .to_string();
            assert!(error.contains(key), "{error}");
        };
        refused("git.sig.other", "key");
        refused("git.bundle", "oci-layout+blob://x@sha256:00");
        refused("git.mtime", "now");
        assert!(read("git://x/y#--upload-pack=x", &[]).is_err());
        assert!(read("git://x/y", &[("git.checksum", "xyz")]).is_err());
    }

    #[test]
    fn bundles_are_checked() {
        let locator = format!("oci-layout+blob://a/b@sha256:{}", "0".repeat(64));
        let bundle = ("git.bundle", locator.as_str());
        let found = read("git://h/x#v1", &[bundle, ("git.checksum", SHA)]).expect("is valid");
        assert!(found.pinned().expect("is valid").is_none());
        let found = read("git://h/x", &[bundle, ("git.checksum", SHA)]).expect("is valid");
        let pinned = found.pinned().expect("is valid").expect("is pinned");
        assert_eq!(pinned, Resolved::commit(SHA, SHA));
        let short = read("git://h/x", &[bundle, ("git.checksum", "0123")]).expect("is valid");
        assert!(short.pinned().is_err());
        let refused =
            |text: &str, attrs: &[(&str, &str)]| read(text, attrs).expect_err("is refused").to_string();
        assert_eq!(
            refused("git://h/x", &[bundle]),
            "git.bundle requires git.checksum to be set"
        );
        let web = [("git.bundle", "https://h/x"), ("git.checksum", SHA)];
        assert!(refused("git://h/x", &web).contains("is not supported"));
        let both = [("git.checkoutbundle", "true"), ("git.keepgitdir", "true")];
        assert!(refused("git://h/x", &both).contains("incompatible with git.keepgitdir"));
        let subdir = [("git.checkoutbundle", "true")];
        assert!(refused("git://h/x#:d", &subdir).contains("incompatible with git.subdir"));
    }

    #[test]
    fn keys_are_buildkits() {
        let key = |text: &str, attrs: &[(&str, &str)]| {
            let found = read(text, attrs).expect("is valid");
            let resolved = Resolved {
                reference: "refs/tags/v1".to_owned(),
                checksum: SHA.to_owned(),
                commit: Some("c".repeat(40)),
            };
            found.key(&resolved)
        };
        let commit = "c".repeat(40);
        assert_eq!(key("git://h/x#v1", &[]), commit);
        assert_eq!(key("git://h/x#v1:a/b", &[]), format!("{commit}:a/b"));
        assert_eq!(
            key("git://h/x", &[("git.keepgitdir", "true")]),
            format!("{SHA}.git#refs/tags/v1")
        );
        let all = [
            ("git.keepgitdir", "true"),
            ("git.skipsubmodules", "true"),
            ("git.mtime", "commit"),
        ];
        assert_eq!(
            key("git://h/x#v1:d", &all),
            format!("{SHA}.git#refs/tags/v1:d(skip-submodules)(mtime=commit)")
        );
        assert_eq!(key("git://h/x", &[("git.mtime", "checkout")]), commit);
        assert_eq!(
            key("git://h/x#v1", &[("git.checkoutbundle", "true")]),
            format!("{commit}(bundle)refs/heads/v1")
        );
    }

    #[test]
    fn commits_are_pinned() {
        let pinned = |text: &str, attrs: &[(&str, &str)]| read(text, attrs).and_then(|found| found.pinned());
        let known = pinned(&format!("git://h/x#{SHA}"), &[("git.checksum", "0123")]).expect("matches");
        assert_eq!(known.map(|known| known.checksum), Some(SHA.to_owned()));
        assert!(pinned(&format!("git://h/x#{SHA}"), &[("git.checksum", "0124")]).is_err());
        assert!(pinned("git://h/x#v1", &[]).expect("is valid").is_none());
        let by_commit = [("git.fetchbycommit", "true"), ("git.checksum", SHA)];
        let known = pinned("git://h/x#v1", &by_commit)
            .expect("is valid")
            .expect("is pinned");
        assert_eq!(
            (known.reference.as_str(), known.checksum.as_str()),
            ("refs/heads/v1", SHA)
        );
        assert!(pinned("git://h/x#v1", &[("git.fetchbycommit", "true")]).is_err());
        assert!(
            pinned(
                "git://h/x#v1",
                &[("git.fetchbycommit", "true"), ("git.checksum", "0123")]
            )
            .is_err()
        );
    }

    #[test]
    fn hides_credentials() {
        assert_eq!(shown("https://u:p@h/x"), "https://xxxxx:xxxxx@h/x");
        assert_eq!(shown("https://u@h/x@y"), "https://xxxxx@h/x@y");
        assert_eq!(shown("git@h:x"), "git@h:x");
        let index = read("git://x/y", &[("git.fullurl", "https://u:p4ss@h/x")])
            .expect("is valid")
            .remote_index();
        assert!(!index.contains("p4ss"), "{index}");
        let found = read("git://x/y", &[("git.fullurl", "https://u%40x:p%3Aq@h:1/x@y")]).expect("is valid");
        assert_eq!(found.credentials(), Some(("u@x".to_owned(), "p:q".to_owned())));
        assert_eq!(
            (found.plain_remote().as_str(), found.http_host()),
            ("https://h:1/x@y", Some("h:1"))
        );
    }
}
