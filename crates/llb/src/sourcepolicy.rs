//! Wire types of package `moby.buildkit.v1.sourcepolicy`, generated from `proto/sourcepolicy.proto`.
#![expect(missing_docs, reason = "the names are those of the protocol")]

include!("gen/moby.buildkit.v1.sourcepolicy.rs");
