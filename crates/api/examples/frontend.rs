//! A frontend that runs in an image: it makes a file with what it was started with and asks the build what it knows.
//!
//! It speaks gRPC over its standard streams, as the daemon expects of every frontend, and finds its options in its
//! environment. The option `fail` makes it return an error, `base` makes the result an input of that name, and `linger`
//! keeps it from ending.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::error::Error;

use api::pb::gateway::llb_bridge_client::LlbBridgeClient;
use api::pb::gateway::{
    InputsRequest, PingRequest, ReadFileRequest, ReturnRequest, SolveRequest, result::Result as Kind,
};
use api::transport::connect_over;
use llb::{FileActions, MarshalOptions, MkfileOptions, State};
use tonic::transport::Channel;

type Bridge = LlbBridgeClient<Channel>;

const PREFIX: &str = "BUILDKIT_FRONTEND_OPT_";
/// Where the daemon leaves the definition of this frontend's own image.
const DEFINITION: &str = "/run/config/buildkit/metadata/frontend.bin";

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let options = options();
    let stream = tokio::io::join(tokio::io::stdin(), tokio::io::stdout());
    let mut bridge = LlbBridgeClient::new(connect_over(stream).await?);
    let returned = match build(&mut bridge, &options).await {
        Ok(result) => ReturnRequest {
            result: Some(result),
            error: None,
        },
        Err(error) => ReturnRequest {
            result: None,
            error: Some(api::errors::Failure::new(tonic::Code::Unknown, error.to_string()).to_rpc()),
        },
    };
    bridge.r#return(returned).await?;
    if options.contains_key("linger") {
        std::future::pending::<()>().await;
    }
    // Standard input is read by a thread that does not end.
    std::process::exit(0)
}

fn options() -> BTreeMap<String, String> {
    let numbered = std::env::vars().filter(|(name, _)| name.starts_with(PREFIX));
    let pairs = numbered.filter_map(|(_, pair)| {
        let (key, value) = pair.split_once('=')?;
        Some((key.to_owned(), value.to_owned()))
    });
    pairs.collect()
}

async fn build(
    bridge: &mut Bridge,
    options: &BTreeMap<String, String>,
) -> Result<api::pb::gateway::Result, Box<dyn Error>> {
    if let Some(reason) = options.get("fail") {
        return Err(reason.clone().into());
    }
    let pong = bridge.ping(PingRequest {}).await?.into_inner();
    let inputs = bridge.inputs(InputsRequest {}).await?.into_inner().definitions;
    let definition = match options.get("base") {
        Some(name) => inputs.get(name).cloned().ok_or("no such input")?,
        None => {
            let mut text: String = options
                .iter()
                .map(|(key, value)| format!("{key}={value}\n"))
                .collect();
            text.push_str(&format!("workers: {}\n", pong.workers.len()));
            text.push_str(&format!("inputs: {}\n", inputs.len()));
            text.push_str(&format!("definition: {}\n", std::fs::read(DEFINITION)?.len() > 1));
            let actions =
                FileActions::new().mkfile("/told", 0o644, text.into_bytes(), MkfileOptions::default());
            let state = State::scratch().file(actions, &llb::Constraints::new());
            state.marshal(&MarshalOptions::default())?
        }
    };
    let request = SolveRequest {
        definition: Some(definition),
        allow_result_return: true,
        allow_result_array_ref: true,
        evaluate: true,
        ..SolveRequest::default()
    };
    let result = bridge.solve(request).await?.into_inner().result;
    let result = result.ok_or("the build has no result")?;
    if options.contains_key("read")
        && let Some(Kind::Ref(reference)) = &result.result
    {
        let request = ReadFileRequest {
            r#ref: reference.id.clone(),
            file_path: "/told".to_owned(),
            ..ReadFileRequest::default()
        };
        let data = bridge.read_file(request).await?.into_inner().data;
        return Err(format!("it reads {} bytes", data.len()).into());
    }
    Ok(result)
}
