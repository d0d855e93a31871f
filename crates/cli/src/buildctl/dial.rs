//! `dial-stdio`: carries a connection to the daemon over standard input and output.

use std::time::Duration;

use tokio::io::{AsyncWriteExt as _, copy};
use tokio::net::UnixStream;

use crate::failure::Failure;

/// Connects to a unix socket and carries bytes until the daemon closes.
pub(super) async fn dial_stdio(address: &str, timeout_s: u64) -> Result<(), Failure> {
    let path = match address.split_once("://") {
        Some(("unix", path)) => path,
        Some((scheme, _)) => {
            return Err(Failure::new(format!(
                "invalid address {address} (expected unix://, got {scheme}://)"
            )));
        }
        None => return Err(Failure::new(format!("invalid address {address}"))),
    };
    let connecting = UnixStream::connect(path);
    let stream = if timeout_s == 0 {
        connecting.await
    } else {
        tokio::time::timeout(Duration::from_secs(timeout_s), connecting)
            .await
            .unwrap_or_else(|late| Err(late.into()))
    };
    let stream = stream.map_err(|error| Failure::new(format!("dial unix {path}: {error}")))?;
    let (mut from_daemon, mut to_daemon) = stream.into_split();
    let (mut stdin, mut stdout) = (tokio::io::stdin(), tokio::io::stdout());
    let inbound = async {
        copy(&mut stdin, &mut to_daemon).await?;
        to_daemon.shutdown().await
    };
    let outbound = async {
        copy(&mut from_daemon, &mut stdout).await?;
        stdout.flush().await
    };
    let mut outbound = std::pin::pin!(outbound);
    // Standard input may never end on a terminal, so the daemon's end ends all.
    tokio::select! {
        result = &mut outbound => return Ok(result?),
        result = inbound => result?,
    }
    Ok(outbound.await?)
}
