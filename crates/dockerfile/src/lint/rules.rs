//! The rules, and how each words what it found. Names, texts and addresses are BuildKit's: users refer to them.

use super::Rule;
use crate::text::quote;

macro_rules! rules {
    ($($id:ident = $name:literal, $url:expr, $experimental:literal, $description:literal;)*) => {
        $(
            #[doc = concat!("`", $name, "`")]
            pub(crate) static $id: Rule =
                Rule { name: $name, description: $description, url: $url, experimental: $experimental };
        )*
    };
}

macro_rules! url {
    ($page:literal) => {
        concat!("https://docs.docker.com/go/dockerfile/rule/", $page, "/")
    };
}

rules! {
    STAGE_NAME_CASING = "StageNameCasing", url!("stage-name-casing"), false,
        "Stage names should be lowercase";
    FROM_AS_CASING = "FromAsCasing", url!("from-as-casing"), false,
        "The 'as' keyword should match the case of the 'from' keyword";
    NO_EMPTY_CONTINUATION = "NoEmptyContinuation", url!("no-empty-continuation"), false,
        "Empty continuation lines will become errors in a future release";
    CONSISTENT_INSTRUCTION_CASING = "ConsistentInstructionCasing", url!("consistent-instruction-casing"), false,
        "All commands within the Dockerfile should use the same casing (either upper or lower)";
    DUPLICATE_STAGE_NAME = "DuplicateStageName", url!("duplicate-stage-name"), false,
        "Stage names should be unique";
    RESERVED_STAGE_NAME = "ReservedStageName", url!("reserved-stage-name"), false,
        "Reserved words should not be used as stage names";
    JSON_ARGS_RECOMMENDED = "JSONArgsRecommended", url!("json-args-recommended"), false,
        "JSON arguments recommended for ENTRYPOINT/CMD to prevent unintended behavior related to OS signals";
    MAINTAINER_DEPRECATED = "MaintainerDeprecated", url!("maintainer-deprecated"), false,
        "The MAINTAINER instruction is deprecated, use a label instead to define an image author";
    UNDEFINED_ARG_IN_FROM = "UndefinedArgInFrom", url!("undefined-arg-in-from"), false,
        "FROM command must use declared ARGs";
    WORKDIR_RELATIVE_PATH = "WorkdirRelativePath", url!("workdir-relative-path"), false,
        "Relative workdir without an absolute workdir declared within the build can have unexpected results if the base image changes";
    UNDEFINED_VAR = "UndefinedVar", url!("undefined-var"), false,
        "Variables should be defined before their use";
    MULTIPLE_INSTRUCTIONS_DISALLOWED = "MultipleInstructionsDisallowed", url!("multiple-instructions-disallowed"), false,
        "Multiple instructions of the same type should not be used in the same stage";
    LEGACY_KEY_VALUE_FORMAT = "LegacyKeyValueFormat", url!("legacy-key-value-format"), false,
        "Legacy key/value format with whitespace separator should not be used";
    INVALID_BASE_IMAGE_PLATFORM = "InvalidBaseImagePlatform", "", false,
        "Base image platform does not match expected target platform";
    REDUNDANT_TARGET_PLATFORM = "RedundantTargetPlatform", url!("redundant-target-platform"), false,
        "Setting platform to predefined $TARGETPLATFORM in FROM is redundant as this is the default behavior";
    SECRETS_USED_IN_ARG_OR_ENV = "SecretsUsedInArgOrEnv", url!("secrets-used-in-arg-or-env"), false,
        "Sensitive data should not be used in the ARG or ENV commands";
    INVALID_DEFAULT_ARG_IN_FROM = "InvalidDefaultArgInFrom", url!("invalid-default-arg-in-from"), false,
        "Default value for global ARG results in an empty or invalid base image name";
    FROM_PLATFORM_FLAG_CONST_DISALLOWED = "FromPlatformFlagConstDisallowed", url!("from-platform-flag-const-disallowed"), false,
        "FROM --platform flag should not use a constant value";
    COPY_IGNORED_FILE = "CopyIgnoredFile", url!("copy-ignored-file"), false,
        "Attempting to Copy file that is excluded by .dockerignore";
    INVALID_DEFINITION_DESCRIPTION = "InvalidDefinitionDescription", url!("invalid-definition-description"), true,
        "Comment for build stage or argument should follow the format: `# <arg/stage name> <description>`. If this is not intended to be a description comment, add an empty line or comment between the instruction and the comment.";
    EXPOSE_PROTO_CASING = "ExposeProtoCasing", url!("expose-proto-casing"), false,
        "Protocol in EXPOSE instruction should be lowercase";
    EXPOSE_INVALID_FORMAT = "ExposeInvalidFormat", url!("expose-invalid-format"), false,
        "IP address and host-port mapping should not be used in EXPOSE instruction. This will become an error in a future release";
}

pub(crate) fn stage_name_casing(name: &str) -> String {
    format!("Stage name '{name}' should be lowercase")
}

pub(crate) fn from_as_casing(from: &str, keyword: &str) -> String {
    format!("'{keyword}' and '{from}' keywords' casing do not match")
}

pub(crate) fn no_empty_continuation() -> String {
    "Empty continuation line".to_owned()
}

pub(crate) fn consistent_instruction_casing(name: &str, casing: &str) -> String {
    format!("Command '{name}' should match the case of the command majority ({casing})")
}

pub(crate) fn duplicate_stage_name(name: &str) -> String {
    format!(
        "Duplicate stage name {}, stage names should be unique",
        quote(name)
    )
}

pub(crate) fn reserved_stage_name(name: &str) -> String {
    format!(
        "Stage name should not use the same name as reserved stage {}",
        quote(name)
    )
}

pub(crate) fn json_args_recommended(instruction: &str) -> String {
    format!(
        "JSON arguments recommended for {instruction} to prevent unintended behavior related to OS signals"
    )
}

pub(crate) fn maintainer_deprecated() -> String {
    "Maintainer instruction is deprecated in favor of using label".to_owned()
}

pub(crate) fn undefined_arg_in_from(name: &str, suggestion: Option<&str>) -> String {
    let suffix = suggestion.map_or_else(String::new, |found| format!(" (did you mean {found}?)"));
    format!("FROM argument '{name}' is not declared{suffix}")
}

pub(crate) fn workdir_relative_path(path: &str) -> String {
    format!(
        "Relative workdir {} can have unexpected results if the base image changes",
        quote(path)
    )
}

pub(crate) fn undefined_var(name: &str, suggestion: Option<&str>) -> String {
    let suffix = suggestion.map_or_else(String::new, |found| format!(" (did you mean ${found}?)"));
    format!("Usage of undefined variable '${name}'{suffix}")
}

pub(crate) fn multiple_instructions_disallowed(instruction: &str) -> String {
    format!(
        "Multiple {instruction} instructions should not be used in the same stage because only the last one will be used"
    )
}

pub(crate) fn legacy_key_value_format(instruction: &str) -> String {
    format!("\"{instruction} key=value\" should be used instead of legacy \"{instruction} key value\" format")
}

pub(crate) fn invalid_base_image_platform(image: &str, expected: &str, actual: &str) -> String {
    format!(
        "Base image {image} was pulled with platform {}, expected {} for current build",
        quote(actual),
        quote(expected)
    )
}

pub(crate) fn redundant_target_platform(variable: &str) -> String {
    format!("Setting platform to predefined {variable} in FROM is redundant as this is the default behavior")
}

pub(crate) fn secrets_used_in_arg_or_env(instruction: &str, name: &str) -> String {
    format!(
        "Do not use ARG or ENV instructions for sensitive data ({instruction} {})",
        quote(name)
    )
}

pub(crate) fn invalid_default_arg_in_from(base: &str) -> String {
    format!("Default value for ARG {base} results in empty or invalid base image name")
}

pub(crate) fn from_platform_flag_const_disallowed(platform: &str) -> String {
    format!(
        "FROM --platform flag should not use constant value {}",
        quote(platform)
    )
}

pub(crate) fn copy_ignored_file(instruction: &str, file: &str) -> String {
    format!(
        "Attempting to {instruction} file {} that is excluded by .dockerignore",
        quote(file)
    )
}

pub(crate) fn invalid_definition_description(instruction: &str, name: &str) -> String {
    format!("Comment for {instruction} should follow the format: `# {name} <description>`")
}

pub(crate) fn expose_proto_casing(port: &str) -> String {
    format!("Defined protocol '{port}' in EXPOSE instruction should be lowercase")
}

pub(crate) fn expose_invalid_format(port: &str) -> String {
    format!("EXPOSE instruction should not define an IP address or host-port mapping, found '{port}'")
}
