//! Accounts: challenges, the token server, and what a token allows.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use super::http::{Request, Response, parse_query};
use super::{Accounts, Shared};

/// Refuses a request that its credentials do not allow.
pub(super) fn refuse(shared: &Shared, request: &Request, repository: &str) -> Option<Response> {
    let accounts = shared.options.accounts.as_ref()?;
    let mut needs = vec![format!("repository:{repository}:pull")];
    if matches!(request.method.as_str(), "POST" | "PUT" | "PATCH") {
        needs.push(format!("repository:{repository}:push"));
    }
    if let Some(from) = request.query.get("from") {
        needs.push(format!("repository:{from}:pull"));
    }
    if accounts.basic {
        let user = basic_user(accounts, request.header("authorization"));
        let allowed = user.is_some() || needs.iter().all(|need| anonymous(accounts, need));
        return (!allowed).then(|| {
            Response::error(401, "UNAUTHORIZED", "authentication required")
                .header("WWW-Authenticate", "Basic realm=\"testkit\"")
        });
    }
    let granted = request
        .header("authorization")
        .strip_prefix("Bearer ")
        .map(|token| {
            let decoded = STANDARD.decode(token).unwrap_or_default();
            String::from_utf8_lossy(&decoded).into_owned()
        });
    if let Some(granted) = &granted
        && needs
            .iter()
            .all(|need| granted.split(' ').any(|grant| grant == need))
    {
        return None;
    }
    let push = if needs.len() > 1 && !request.query.contains_key("from") {
        ",push"
    } else {
        ""
    };
    let error = if granted.is_some() {
        ",error=\"insufficient_scope\""
    } else {
        ""
    };
    let challenge = format!(
        "Bearer realm=\"http://{}/token\",service=\"testkit\",scope=\"repository:{repository}:pull{push}\"{error}",
        shared.address
    );
    Some(
        Response::error(401, "UNAUTHORIZED", "authentication required").header("WWW-Authenticate", challenge),
    )
}

/// Answers the token server's requests.
pub(super) fn issue(shared: &Shared, request: &Request) -> Response {
    let Some(accounts) = &shared.options.accounts else {
        return Response::new(404);
    };
    let (scope, user) = if request.method == "POST" {
        let form = parse_query(&String::from_utf8_lossy(&request.body));
        let field = |key: &str| form.get(key).cloned().unwrap_or_default();
        let (name, password) = (field("username"), field("password"));
        let known = accounts.users.get(&name) == Some(&password);
        let refresh = accounts
            .users
            .iter()
            .find(|(_, secret)| **secret == field("refresh_token"));
        let user = if known {
            Some(name)
        } else {
            refresh.map(|(name, _)| name.clone())
        };
        if user.is_none() {
            return Response::error(401, "UNAUTHORIZED", "incorrect username or password");
        }
        (field("scope"), user)
    } else {
        if accounts.post_only {
            return Response::new(405);
        }
        let header = request.header("authorization");
        let user = basic_user(accounts, header);
        if user.is_none() && !header.is_empty() {
            return Response::error(401, "UNAUTHORIZED", "incorrect username or password");
        }
        (request.query.get("scope").cloned().unwrap_or_default(), user)
    };
    let mut granted = vec!["testkit".to_owned()];
    for scope in scope.split(' ') {
        let Some((name, actions)) = scope.rsplit_once(':') else {
            continue;
        };
        for action in actions.split(',') {
            let grant = format!("{name}:{action}");
            let read_only = accounts
                .read_only
                .iter()
                .any(|path| grant == format!("repository:{path}:push"));
            if !read_only && (user.is_some() || anonymous(accounts, &grant)) {
                granted.push(grant);
            }
        }
    }
    let token = STANDARD.encode(granted.join(" "));
    let mut body = serde_json::json!({ "token": token });
    if accounts.expires_in_s > 0 {
        body["expires_in"] = accounts.expires_in_s.into();
    }
    Response::new(200)
        .header("Content-Type", "application/json")
        .body(body.to_string())
}

fn anonymous(accounts: &Accounts, grant: &str) -> bool {
    accounts
        .public
        .iter()
        .any(|path| grant == format!("repository:{path}:pull"))
}

fn basic_user(accounts: &Accounts, header: &str) -> Option<String> {
    let decoded = STANDARD.decode(header.strip_prefix("Basic ")?).ok()?;
    let text = String::from_utf8(decoded).ok()?;
    let (name, password) = text.split_once(':')?;
    (accounts.users.get(name)? == password).then(|| name.to_owned())
}
