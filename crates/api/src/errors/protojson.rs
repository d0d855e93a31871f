//! Operations in protobuf's JSON mapping, as far as readers need it: they accept the names of the `.proto` file, and
//! numbers for enums and 64-bit integers, but each oneof must be inline.

use llb::pb::{FileAction, Op, UserOpt, file_action::Action, op, user_opt::User};
use serde_json::{Map, Value, json};

/// Encodes an operation.
pub(super) fn op(op: &Op) -> Value {
    let mut out = object(serde_json::to_value(op));
    if let Some(Value::Object(kind)) = out.remove("Op") {
        out.extend(kind);
    }
    if let Some(op::Op::File(file)) = &op.op {
        let actions: Vec<Value> = file.actions.iter().map(action).collect();
        out.insert("file".into(), json!({ "actions": actions }));
    }
    Value::Object(out)
}

fn object(value: serde_json::Result<Value>) -> Map<String, Value> {
    match value {
        Ok(Value::Object(map)) => map,
        _ => Map::new(),
    }
}

fn action(action: &FileAction) -> Value {
    let mut out = object(serde_json::to_value(action));
    let owner = match &action.action {
        Some(Action::Copy(copy)) => copy.owner.as_ref(),
        Some(Action::Mkfile(mkfile)) => mkfile.owner.as_ref(),
        Some(Action::Mkdir(mkdir)) => mkdir.owner.as_ref(),
        Some(Action::Symlink(symlink)) => symlink.owner.as_ref(),
        Some(Action::Rm(_)) | None => None,
    };
    if let Some(Value::Object(mut kind)) = out.remove("Action") {
        if let (Some(owner), Some(inner)) = (owner, kind.values_mut().next()) {
            inner["owner"] =
                json!({"user": owner.user.as_ref().map(user), "group": owner.group.as_ref().map(user)});
        }
        out.extend(kind);
    }
    Value::Object(out)
}

fn user(opt: &UserOpt) -> Value {
    match &opt.user {
        Some(User::ByName(name)) => json!({"byName": {"name": name.name, "input": name.input}}),
        Some(User::ById(id)) => json!({"byID": id}),
        None => json!({}),
    }
}
