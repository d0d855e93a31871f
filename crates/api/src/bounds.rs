//! How long the messages of statuses may be: clients give up on headers that are too long, and what a hostile client sends
//! comes back to it in many of them.

use http::{HeaderMap, Response};
use http_body::Frame;
use http_body_util::BodyExt as _;
use tonic::Status;
use tonic::body::Body;
use tower::util::MapResponseLayer;

/// Most bytes of a status' message, before it is encoded for a header; as many as errors of builds have.
pub const MAX_STATUS_BYTES: usize = 8 << 10;

/// A layer for servers that cuts the messages of statuses to [`MAX_STATUS_BYTES`], whoever made them.
pub type BoundStatuses = MapResponseLayer<fn(Response<Body>) -> Response<Body>>;

/// Makes the layer.
pub fn bound_statuses() -> BoundStatuses {
    MapResponseLayer::new(bound_response)
}

fn bound_response(mut response: Response<Body>) -> Response<Body> {
    bound(response.headers_mut());
    response.map(|body| {
        Body::new(body.map_frame(|frame| match frame.into_trailers() {
            Ok(mut trailers) => {
                bound(&mut trailers);
                Frame::trailers(trailers)
            }
            // What is no trailers is data.
            Err(frame) => frame,
        }))
    })
}

/// Cuts the message in headers or trailers, if there is one.
fn bound(headers: &mut HeaderMap) {
    // Encoding never makes a text shorter.
    let is_short = |message: &http::HeaderValue| message.len() <= MAX_STATUS_BYTES;
    if headers.get(Status::GRPC_MESSAGE).is_none_or(is_short) {
        return;
    }
    let Some(status) = Status::from_header_map(headers) else {
        return;
    };
    let message = status.message();
    if message.len() <= MAX_STATUS_BYTES {
        return;
    }
    let kept = &message[..message.floor_char_boundary(MAX_STATUS_BYTES - 64)];
    let text = format!("{kept}… ({} bytes more)", message.len() - kept.len());
    let details = bytes::Bytes::copy_from_slice(status.details());
    // A status that cannot be encoded stays as it was; text and bytes always can.
    let _ = Status::with_details(status.code(), text, details).add_header(headers);
}

#[cfg(test)]
mod tests {
    use futures_util::StreamExt as _;
    use tonic::Code;

    use super::*;

    fn message(headers: &HeaderMap) -> String {
        Status::from_header_map(headers).unwrap().message().to_owned()
    }

    fn headers(message: &str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        let status = Status::with_details(Code::NotFound, message, "details".into());
        status.add_header(&mut headers).unwrap();
        headers
    }

    #[test]
    fn messages_are_cut_between_characters() {
        for text in [
            "x".repeat(1 << 20),
            "ä€".repeat(1 << 18),
            "%".repeat(MAX_STATUS_BYTES + 1),
        ] {
            let mut headers = headers(&text);
            bound(&mut headers);
            let cut = message(&headers);
            assert!(cut.len() <= MAX_STATUS_BYTES, "{}", cut.len());
            let (kept, rest) = cut.rsplit_once("… (").unwrap();
            assert!(text.starts_with(kept));
            assert_eq!(rest, format!("{} bytes more)", text.len() - kept.len()));
            let status = Status::from_header_map(&headers).unwrap();
            assert_eq!(
                (status.code(), status.details()),
                (Code::NotFound, b"details".as_slice())
            );
        }
        // Longer than the limit only in its encoding.
        for text in ["short".to_owned(), "%".repeat(MAX_STATUS_BYTES)] {
            let mut headers = headers(&text);
            bound(&mut headers);
            assert_eq!(message(&headers), text);
        }
    }

    #[tokio::test]
    async fn statuses_at_the_end_of_a_stream_are_cut() {
        let frames = tokio_stream::iter([
            Ok::<_, Status>(Frame::data(bytes::Bytes::from_static(b"data"))),
            Ok(Frame::trailers(headers(&"x".repeat(1 << 20)))),
        ]);
        let body = Body::new(http_body_util::StreamBody::new(frames));
        let response = bound_response(Response::new(body));
        let mut frames = http_body_util::BodyStream::new(response.into_body());
        let data = frames.next().await.unwrap().unwrap().into_data().unwrap();
        assert_eq!(data, b"data".as_slice());
        let trailers = frames.next().await.unwrap().unwrap().into_trailers().unwrap();
        assert!(message(&trailers).len() <= MAX_STATUS_BYTES);
    }
}
