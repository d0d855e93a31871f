//! Names of the attributes of sources and builds, and their special values.

/// `git.keepgitdir`
pub const KEEP_GIT_DIR: &str = "git.keepgitdir";
/// `git.fullurl`
pub const FULL_REMOTE_URL: &str = "git.fullurl";
/// `git.authheadersecret`
pub const AUTH_HEADER_SECRET: &str = "git.authheadersecret";
/// `git.authtokensecret`
pub const AUTH_TOKEN_SECRET: &str = "git.authtokensecret";
/// `git.knownsshhosts`
pub const KNOWN_SSH_HOSTS: &str = "git.knownsshhosts";
/// `git.mountsshsock`
pub const MOUNT_SSH_SOCK: &str = "git.mountsshsock";
/// `git.checksum`
pub const GIT_CHECKSUM: &str = "git.checksum";
/// `git.skipsubmodules`
pub const GIT_SKIP_SUBMODULES: &str = "git.skipsubmodules";
/// `git.mtime`
pub const GIT_MTIME: &str = "git.mtime";
/// `git.fetchbycommit`
pub const GIT_FETCH_BY_COMMIT: &str = "git.fetchbycommit";
/// `git.bundle`
pub const GIT_BUNDLE: &str = "git.bundle";
/// `git.checkoutbundle`
pub const GIT_CHECKOUT_BUNDLE: &str = "git.checkoutbundle";
/// `git.sig.pubkey`
pub const GIT_SIGNATURE_VERIFY_PUB_KEY: &str = "git.sig.pubkey";
/// `git.sig.rejectexpired`
pub const GIT_SIGNATURE_VERIFY_REJECT_EXPIRED: &str = "git.sig.rejectexpired";
/// `git.sig.requiresignedtag`
pub const GIT_SIGNATURE_VERIFY_REQUIRE_SIGNED_TAG: &str = "git.sig.requiresignedtag";
/// `git.sig.ignoresignedtag`
pub const GIT_SIGNATURE_VERIFY_IGNORE_SIGNED_TAG: &str = "git.sig.ignoresignedtag";
/// `local.session`
pub const LOCAL_SESSION_ID: &str = "local.session";
/// `local.unique`
pub const LOCAL_UNIQUE_ID: &str = "local.unique";
/// `local.includepattern`
pub const INCLUDE_PATTERNS: &str = "local.includepattern";
/// `local.followpaths`
pub const FOLLOW_PATHS: &str = "local.followpaths";
/// `local.excludepatterns`
pub const EXCLUDE_PATTERNS: &str = "local.excludepatterns";
/// `local.sharedkeyhint`
pub const SHARED_KEY_HINT: &str = "local.sharedkeyhint";
/// `local.metadatatransfer`
pub const METADATA_TRANSFER: &str = "local.metadatatransfer";
/// `local.metadatatransferexclude`
pub const METADATA_TRANSFER_EXCLUDE: &str = "local.metadatatransferexclude";
/// `llbbuild.filename`
pub const LLB_DEFINITION_FILENAME: &str = "llbbuild.filename";
/// `http.checksum`
pub const HTTP_CHECKSUM: &str = "http.checksum";
/// `http.filename`
pub const HTTP_FILENAME: &str = "http.filename";
/// `http.perm`
pub const HTTP_PERM: &str = "http.perm";
/// `http.uid`
pub const HTTP_UID: &str = "http.uid";
/// `http.gid`
pub const HTTP_GID: &str = "http.gid";
/// `http.authheadersecret`
pub const HTTP_AUTH_HEADER_SECRET: &str = "http.authheadersecret";
/// `http.header.`
pub const HTTP_HEADER_PREFIX: &str = "http.header.";
/// `http.sig.pubkey`
pub const HTTP_SIGNATURE_VERIFY_PUB_KEY: &str = "http.sig.pubkey";
/// `http.sig.signature`
pub const HTTP_SIGNATURE_VERIFY: &str = "http.sig.signature";
/// `image.resolvemode`
pub const IMAGE_RESOLVE_MODE: &str = "image.resolvemode";
/// `default`
pub const IMAGE_RESOLVE_MODE_DEFAULT: &str = "default";
/// `pull`
pub const IMAGE_RESOLVE_MODE_FORCE_PULL: &str = "pull";
/// `local`
pub const IMAGE_RESOLVE_MODE_PREFER_LOCAL: &str = "local";
/// `image.recordtype`
pub const IMAGE_RECORD_TYPE: &str = "image.recordtype";
/// `image.layerlimit`
pub const IMAGE_LAYER_LIMIT: &str = "image.layerlimit";
/// `image.checksum`
pub const IMAGE_CHECKSUM: &str = "image.checksum";
/// `oci.session`
pub const OCI_LAYOUT_SESSION_ID: &str = "oci.session";
/// `oci.store`
pub const OCI_LAYOUT_STORE_ID: &str = "oci.store";
/// `oci.layerlimit`
pub const OCI_LAYOUT_LAYER_LIMIT: &str = "oci.layerlimit";
/// `local.differ`
pub const LOCAL_DIFFER: &str = "local.differ";
/// `none`
pub const LOCAL_DIFFER_NONE: &str = "none";
/// `metadata`
pub const LOCAL_DIFFER_METADATA: &str = "metadata";
