//! The distribution API on what is stored.

use bytes::Bytes;
use oci::{Descriptor, Digest, Index, Manifest, media_type};

use super::http::{Request, Response};
use super::{Contents, Quirk, Repository, Shared, token};

/// Answers a request.
pub(super) fn answer(shared: &Shared, request: &Request) -> Response {
    if request.path == "/token" {
        return token::issue(shared, request);
    }
    let Some(rest) = request.path.strip_prefix("/v2/") else {
        return Response::new(404);
    };
    if rest.is_empty() {
        return Response::new(200);
    }
    for (mark, kind) in [
        ("/manifests/", "manifests"),
        ("/blobs/uploads/", "uploads"),
        ("/blobs/", "blobs"),
        ("/referrers/", "referrers"),
    ] {
        let Some((repository, object)) = rest.split_once(mark) else {
            continue;
        };
        if let Some(refusal) = token::refuse(shared, request, repository) {
            return refusal;
        }
        let mut contents = shared.lock();
        return match kind {
            "manifests" => manifests(shared, &mut contents, request, repository, object),
            "uploads" => uploads(shared, &mut contents, request, repository, object),
            "blobs" => blobs(shared, &contents, request, repository, object),
            _ => referrers(shared, &contents, request, repository, object),
        };
    }
    Response::new(404)
}

fn manifests(
    shared: &Shared,
    contents: &mut Contents,
    request: &Request,
    repository: &str,
    object: &str,
) -> Response {
    if request.method == "PUT" {
        return put_manifest(contents, request, repository, object);
    }
    if request.method == "HEAD" && shared.options.quirks.contains(&Quirk::NoHead) {
        return Response::new(405);
    }
    let found = contents.repositories.get(repository).and_then(|stored| {
        let digest = stored.tags.get(object).copied().or_else(|| object.parse().ok())?;
        stored
            .manifests
            .get(&digest)
            .map(|(media_type, bytes)| (digest, media_type.clone(), bytes.clone()))
    });
    let Some((digest, media_type, bytes)) = found else {
        return Response::error(404, "MANIFEST_UNKNOWN", "manifest unknown");
    };
    let response = Response::new(200).header("Content-Type", media_type).body(bytes);
    if shared.options.quirks.contains(&Quirk::NoDigestHeader) {
        return response;
    }
    response.header("Docker-Content-Digest", digest.to_string())
}

fn put_manifest(contents: &mut Contents, request: &Request, repository: &str, object: &str) -> Response {
    let stored = contents.repositories.entry(repository.to_owned()).or_default();
    if let Some(missing) = missing_child(stored, &request.body) {
        return Response::error(
            400,
            "MANIFEST_BLOB_UNKNOWN",
            &format!("{missing} unknown to registry"),
        );
    }
    let digest = Digest::sha256(&request.body);
    match object.parse::<Digest>() {
        Ok(named) if named != digest => return Response::error(400, "DIGEST_INVALID", "digest mismatch"),
        Ok(_) => {}
        Err(_) => {
            stored.tags.insert(object.to_owned(), digest);
        }
    }
    let media_type = request.header("content-type").to_owned();
    stored
        .manifests
        .insert(digest, (media_type, request.body.clone()));
    Response::new(201).header("Docker-Content-Digest", digest.to_string())
}

/// The first blob or manifest that a manifest refers to and the repository lacks.
fn missing_child(stored: &Repository, bytes: &Bytes) -> Option<Digest> {
    if let Ok(manifest) = serde_json::from_slice::<Manifest>(bytes) {
        let children = std::iter::once(&manifest.config).chain(&manifest.layers);
        return children
            .map(|child| child.digest)
            .find(|digest| !stored.blobs.contains_key(digest));
    }
    let index: Index = serde_json::from_slice(bytes).ok()?;
    let children = index.manifests.into_iter().map(|child| child.digest);
    children
        .into_iter()
        .find(|digest| !stored.manifests.contains_key(digest))
}

fn blobs(
    shared: &Shared,
    contents: &Contents,
    request: &Request,
    repository: &str,
    object: &str,
) -> Response {
    let digest: Option<Digest> = object.parse().ok();
    let found = digest.and_then(|digest| contents.repositories.get(repository)?.blobs.get(&digest).cloned());
    let Some(bytes) = found else {
        return Response::error(404, "BLOB_UNKNOWN", "blob unknown to registry");
    };
    let range = request
        .header("range")
        .strip_prefix("bytes=")
        .and_then(|range| range.strip_suffix('-'));
    let start: usize = match range {
        Some(start) if !shared.options.quirks.contains(&Quirk::NoRanges) => start.parse().unwrap_or(0),
        _ => 0,
    };
    if start == 0 {
        return Response::new(200)
            .header("Docker-Content-Digest", object)
            .body(bytes);
    }
    if start >= bytes.len() {
        return Response::new(416);
    }
    let range = format!("bytes {start}-{}/{}", bytes.len() - 1, bytes.len());
    Response::new(206)
        .header("Content-Range", range)
        .body(bytes.slice(start..))
}

fn uploads(
    shared: &Shared,
    contents: &mut Contents,
    request: &Request,
    repository: &str,
    object: &str,
) -> Response {
    if request.method == "POST" {
        return start_upload(contents, request, repository);
    }
    let id: u64 = object.parse().unwrap_or(u64::MAX);
    let limit = shared.options.max_put_bytes.unwrap_or(usize::MAX);
    let Some(upload) = contents.uploads.get_mut(&id) else {
        return Response::error(404, "BLOB_UPLOAD_UNKNOWN", "blob upload unknown to registry");
    };
    let location = format!("/v2/{repository}/blobs/uploads/{id}");
    match request.method.as_str() {
        "PATCH" => {
            let start = request
                .header("content-range")
                .split('-')
                .next()
                .and_then(|start| start.parse().ok());
            if start.is_some_and(|start: usize| start != upload.len()) {
                return Response::new(416);
            }
            upload.extend_from_slice(&request.body);
            let range = format!("0-{}", upload.len().saturating_sub(1));
            Response::new(202)
                .header("Location", location)
                .header("Range", range)
        }
        "GET" => {
            let range = format!("0-{}", upload.len().saturating_sub(1));
            Response::new(204)
                .header("Location", location)
                .header("Range", range)
        }
        "PUT" if request.body.len() > limit => Response::new(413),
        "PUT" => {
            upload.extend_from_slice(&request.body);
            let bytes = Bytes::from(contents.uploads.remove(&id).unwrap_or_default());
            let digest = Digest::sha256(&bytes);
            if request.query.get("digest") != Some(&digest.to_string()) {
                return Response::error(
                    400,
                    "DIGEST_INVALID",
                    "provided digest did not match uploaded content",
                );
            }
            contents
                .repositories
                .entry(repository.to_owned())
                .or_default()
                .blobs
                .insert(digest, bytes);
            Response::new(201).header("Docker-Content-Digest", digest.to_string())
        }
        _ => Response::new(405),
    }
}

fn start_upload(contents: &mut Contents, request: &Request, repository: &str) -> Response {
    if let (Some(mount), Some(from)) = (request.query.get("mount"), request.query.get("from")) {
        let digest: Option<Digest> = mount.parse().ok();
        let found = digest.and_then(|digest| {
            Some((
                digest,
                contents.repositories.get(from)?.blobs.get(&digest)?.clone(),
            ))
        });
        if let Some((digest, bytes)) = found {
            contents
                .repositories
                .entry(repository.to_owned())
                .or_default()
                .blobs
                .insert(digest, bytes);
            return Response::new(201).header("Docker-Content-Digest", digest.to_string());
        }
    }
    let id = contents.next_upload;
    contents.next_upload += 1;
    contents.uploads.insert(id, Vec::new());
    Response::new(202).header("Location", format!("/v2/{repository}/blobs/uploads/{id}"))
}

fn referrers(
    shared: &Shared,
    contents: &Contents,
    request: &Request,
    repository: &str,
    object: &str,
) -> Response {
    if shared.options.quirks.contains(&Quirk::NoReferrers) {
        return Response::new(404);
    }
    let subject: Option<Digest> = object.parse().ok();
    let mut found = Vec::new();
    if let Some(stored) = contents.repositories.get(repository) {
        for (digest, (media_type, bytes)) in &stored.manifests {
            let Ok(manifest) = serde_json::from_slice::<Manifest>(bytes) else {
                continue;
            };
            if manifest.subject.map(|subject| subject.digest) != subject || subject.is_none() {
                continue;
            }
            let mut descriptor = Descriptor::new(media_type.as_str(), *digest, bytes.len() as u64);
            descriptor.artifact_type = manifest.artifact_type;
            let wanted = request.query.get("artifactType");
            if wanted.is_none_or(|wanted| *wanted == descriptor.artifact_type) {
                found.push(descriptor);
            }
        }
    }
    let body = serde_json::to_vec(&Index::new(found)).expect("an index is JSON");
    Response::new(200)
        .header("Content-Type", media_type::OCI_INDEX)
        .body(body)
}
