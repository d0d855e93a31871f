//! Wire types of package `pb`, generated from `proto/ops.proto`.
#![expect(missing_docs, reason = "the names are those of the protocol")]
#![expect(
    clippy::large_enum_variant,
    clippy::struct_excessive_bools,
    reason = "the shapes are those of the protocol"
)]

include!("gen/pb.rs");

impl From<&oci::Platform> for Platform {
    fn from(platform: &oci::Platform) -> Self {
        Self {
            architecture: platform.architecture.clone(),
            os: platform.os.clone(),
            variant: platform.variant.clone(),
            os_version: platform.os_version.clone(),
            os_features: platform.os_features.clone(),
        }
    }
}

impl From<&Platform> for oci::Platform {
    fn from(platform: &Platform) -> Self {
        Self {
            architecture: platform.architecture.clone(),
            os: platform.os.clone(),
            os_version: platform.os_version.clone(),
            os_features: platform.os_features.clone(),
            variant: platform.variant.clone(),
        }
    }
}

/// An input or output index that means "none".
pub const EMPTY: i64 = -1;

/// The name of the input of a `BuildOp` that holds the definition, and of the file it is read from by default.
pub const LLB_DEFINITION_INPUT: &str = "buildkit.llb.definition";
