//! Wire types and gRPC stubs, generated from `proto/`. The tree of modules is that of the packages.
//!
//! The short names are the ones to use: [`control`], [`gateway`], [`worker`], [`filesync`], [`secrets`], [`ssh`],
//! [`upload`], [`exporter`], [`policysession`], [`fsutil`], [`apicaps`], [`errdefs`], [`stack`], [`rpc`], [`trace`], [`content`],
//! and Cooper's own [`explain`].
#![expect(missing_docs, reason = "the names are those of the protocol")]
#![expect(
    clippy::large_enum_variant,
    clippy::struct_excessive_bools,
    clippy::too_many_lines,
    reason = "the shapes are those of the protocol and of its generator"
)]

pub mod moby {
    pub mod buildkit {
        pub mod secrets {
            pub mod v1 {
                include!("gen/moby.buildkit.secrets.v1.rs");
            }
        }
        pub mod v1 {
            include!("gen/moby.buildkit.v1.rs");

            pub mod apicaps {
                include!("gen/moby.buildkit.v1.apicaps.rs");
            }
            pub mod frontend {
                include!("gen/moby.buildkit.v1.frontend.rs");
            }
            pub mod sourcepolicy {
                pub mod policysession {
                    include!("gen/moby.buildkit.v1.sourcepolicy.policysession.rs");
                }
            }
            pub mod types {
                include!("gen/moby.buildkit.v1.types.rs");
            }
        }
    }
    pub mod exporter {
        pub mod v1 {
            include!("gen/moby.exporter.v1.rs");
        }
    }
    pub mod filesync {
        pub mod v1 {
            include!("gen/moby.filesync.v1.rs");
        }
    }
    pub mod sshforward {
        pub mod v1 {
            include!("gen/moby.sshforward.v1.rs");
        }
    }
    pub mod upload {
        pub mod v1 {
            include!("gen/moby.upload.v1.rs");
        }
    }
}

pub mod cooper {
    pub mod v1 {
        include!("gen/cooper.v1.rs");
    }
}

pub mod containerd {
    pub mod services {
        pub mod content {
            pub mod v1 {
                include!("gen/containerd.services.content.v1.rs");
            }
        }
    }
}

pub mod errdefs {
    include!("gen/errdefs.rs");
}

pub mod fsutil {
    pub mod types {
        include!("gen/fsutil.types.rs");
    }
    pub use types::*;
}

pub mod google {
    pub mod rpc {
        include!("gen/google.rpc.rs");
    }
}

pub mod opentelemetry {
    pub mod proto {
        pub mod collector {
            pub mod trace {
                pub mod v1 {
                    include!("gen/opentelemetry.proto.collector.trace.v1.rs");
                }
            }
        }
    }
}

pub mod stack {
    include!("gen/stack.rs");
}

pub use containerd::services::content::v1 as content;
pub use cooper::v1 as explain;
pub use google::rpc;
pub use llb::{pb, sourcepolicy};
pub use moby::buildkit::secrets::v1 as secrets;
pub use moby::buildkit::v1 as control;
pub use moby::buildkit::v1::sourcepolicy::policysession;
pub use moby::buildkit::v1::{apicaps, frontend as gateway, types as worker};
pub use moby::exporter::v1 as exporter;
pub use moby::filesync::v1 as filesync;
pub use moby::sshforward::v1 as ssh;
pub use moby::upload::v1 as upload;
pub use opentelemetry::proto::collector::trace::v1 as trace;

/// Prints the shape of messages that hold secrets, never the secrets.
macro_rules! redacted {
    ($($message:ty { $($shown:ident),* }),* $(,)?) => {$(
        impl std::fmt::Debug for $message {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.debug_struct(stringify!($message))$(.field(stringify!($shown), &self.$shown))*.finish_non_exhaustive()
            }
        }
    )*};
}

redacted! {
    filesync::CredentialsResponse { username },
    filesync::FetchTokenResponse { expires_in, issued_at },
    secrets::GetSecretResponse {},
}
