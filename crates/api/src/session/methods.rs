//! gRPC paths of the services that clients host.

/// Directories of the client.
pub const FILE_SYNC: &[&str] = &[FILE_SYNC_DIFF_COPY, "/moby.filesync.v1.FileSync/TarStream"];
/// Targets of exports.
pub const FILE_SEND: &[&str] = &[FILE_SEND_DIFF_COPY];
/// Accounts and tokens for registries.
pub const AUTH: &[&str] = &[
    AUTH_CREDENTIALS,
    AUTH_FETCH_TOKEN,
    AUTH_GET_TOKEN_AUTHORITY,
    AUTH_VERIFY_TOKEN_AUTHORITY,
];
/// Secrets.
pub const SECRETS: &[&str] = &[GET_SECRET];
/// SSH agents.
pub const SSH: &[&str] = &[SSH_CHECK_AGENT, SSH_FORWARD_AGENT];
/// Streams a client offers.
pub const UPLOAD: &[&str] = &[UPLOAD_PULL];
/// Exporters a client chooses late.
pub const EXPORTER: &[&str] = &[FIND_EXPORTERS, FINALIZE_EXPORT];
/// A client that decides on sources.
pub const POLICY: &[&str] = &[CHECK_POLICY];
/// Content stores of the client.
pub const CONTENT: &[&str] = &[
    "/containerd.services.content.v1.Content/Info",
    "/containerd.services.content.v1.Content/Update",
    "/containerd.services.content.v1.Content/List",
    "/containerd.services.content.v1.Content/Delete",
    "/containerd.services.content.v1.Content/Read",
    "/containerd.services.content.v1.Content/Status",
    "/containerd.services.content.v1.Content/ListStatuses",
    "/containerd.services.content.v1.Content/Write",
    "/containerd.services.content.v1.Content/Abort",
];
/// Health, which every session offers.
pub const HEALTH: &[&str] = &["/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"];

/// Sends a directory.
pub const FILE_SYNC_DIFF_COPY: &str = "/moby.filesync.v1.FileSync/DiffCopy";
/// Receives a directory or a file.
pub const FILE_SEND_DIFF_COPY: &str = "/moby.filesync.v1.FileSend/DiffCopy";
/// Returns an account.
pub const AUTH_CREDENTIALS: &str = "/moby.filesync.v1.Auth/Credentials";
/// Returns a token.
pub const AUTH_FETCH_TOKEN: &str = "/moby.filesync.v1.Auth/FetchToken";
/// Returns a public key.
pub const AUTH_GET_TOKEN_AUTHORITY: &str = "/moby.filesync.v1.Auth/GetTokenAuthority";
/// Signs.
pub const AUTH_VERIFY_TOKEN_AUTHORITY: &str = "/moby.filesync.v1.Auth/VerifyTokenAuthority";
/// Returns a secret.
pub const GET_SECRET: &str = "/moby.buildkit.secrets.v1.Secrets/GetSecret";
/// Tells whether there is an agent.
pub const SSH_CHECK_AGENT: &str = "/moby.sshforward.v1.SSH/CheckAgent";
/// Connects to an agent.
pub const SSH_FORWARD_AGENT: &str = "/moby.sshforward.v1.SSH/ForwardAgent";
/// Returns a stream.
pub const UPLOAD_PULL: &str = "/moby.upload.v1.Upload/Pull";
/// Asks for exporters.
pub const FIND_EXPORTERS: &str = "/moby.exporter.v1.Exporter/FindExporters";
/// Tells that an export is done.
pub const FINALIZE_EXPORT: &str = "/moby.exporter.v1.Exporter/FinalizeExport";
/// Asks for a decision.
pub const CHECK_POLICY: &str = "/moby.buildkit.v1.sourcepolicy.policysession.PolicyVerifier/CheckPolicy";
