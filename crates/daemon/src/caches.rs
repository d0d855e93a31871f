//! Reads caches in registries without an engine: what `cooper cache inspect` shows.

use std::pin::Pin;
use std::sync::Arc;

use async_trait::async_trait;
use oci::{Descriptor, Digest, DigestError, Reference, ReferenceError};
use registry::{
    BasicCredentials, Client, ClientOptions, Credentials, CredentialsError, HostsConfig, RegistryError,
    Token, TokenRequest,
};

/// Largest document of a cache that is read.
const MAX_BYTES: u64 = 64 << 20;

/// A user name and a secret for a host, as the client's configuration has them; both empty: none.
pub type Account = (String, String);
/// Asks for the account of a host; the error is a text for the user.
pub type AskAccount =
    Arc<dyn Fn(String) -> Pin<Box<dyn Future<Output = Result<Account, String>> + Send>> + Send + Sync>;

/// Why a cache in a registry cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// The name is none.
    #[error("failed to parse {name}: {source}")]
    Name {
        /// What was given.
        name: String,
        /// Why.
        source: ReferenceError,
    },
    /// A document names a blob by something that is no digest.
    #[error("invalid digest {digest:?}: {source}")]
    Digest {
        /// What was given.
        digest: String,
        /// Why.
        source: DigestError,
    },
    /// The registry does not give it.
    #[error(transparent)]
    Registry(#[from] RegistryError),
}

/// A name in a registry that was resolved.
#[derive(Debug)]
pub struct RemoteCache {
    client: Client,
    reference: Reference,
    root: Descriptor,
}

impl RemoteCache {
    /// Resolves a name; `insecure` allows plain HTTP and certificates that nobody vouches for.
    ///
    /// # Errors
    /// When the name is none, or the registry does not have it.
    pub async fn open(name: &str, insecure: bool, ask: AskAccount) -> Result<Self, CacheError> {
        let parsed = Reference::parse(name).map_err(|source| CacheError::Name {
            name: name.to_owned(),
            source,
        })?;
        let reference = parsed.with_default_tag();
        let options = ClientOptions {
            max_manifest_bytes: MAX_BYTES,
            ..ClientOptions::default()
        };
        let mut client = Client::with_options(HostsConfig::default(), options);
        client = client.with_credentials(Arc::new(Accounts(ask)));
        if insecure {
            client = client.with_insecure(reference.domain());
        }
        let root = client.resolve(&reference).await?;
        Ok(Self {
            client,
            reference,
            root,
        })
    }

    /// The digest that the name stands for.
    pub fn root(&self) -> String {
        self.root.digest.to_string()
    }

    /// Reads a manifest or an index; verified.
    ///
    /// # Errors
    /// When the registry does not give it.
    pub async fn manifest(&self, digest: &str) -> Result<Vec<u8>, CacheError> {
        let descriptor = Descriptor::new("", parse(digest)?, 0);
        Ok(self.client.manifest(&self.reference, &descriptor).await?.into())
    }

    /// Reads a small blob of so many bytes; verified.
    ///
    /// # Errors
    /// When the registry does not give it, or it is too large.
    pub async fn blob(&self, digest: &str, size_bytes: u64) -> Result<Vec<u8>, CacheError> {
        let descriptor = Descriptor::new("", parse(digest)?, size_bytes);
        Ok(self
            .client
            .fetch_bytes(&self.reference, &descriptor)
            .await?
            .into())
    }

    /// Asks how many bytes a blob has; `None`: it is not there.
    ///
    /// # Errors
    /// When the registry does not tell.
    pub async fn size(&self, digest: &str) -> Result<Option<u64>, CacheError> {
        match self.client.stat_blob(&self.reference, &parse(digest)?).await {
            Ok(found) => Ok(Some(found.size)),
            Err(RegistryError::NotFound { .. }) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

fn parse(digest: &str) -> Result<Digest, CacheError> {
    digest.parse().map_err(|source| CacheError::Digest {
        digest: digest.to_owned(),
        source,
    })
}

/// Accounts of the client's own configuration.
struct Accounts(AskAccount);

impl std::fmt::Debug for Accounts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Accounts").finish_non_exhaustive()
    }
}

#[async_trait]
impl Credentials for Accounts {
    async fn basic(&self, host: &str) -> Result<Option<BasicCredentials>, CredentialsError> {
        let asked = (self.0)(host.to_owned()).await;
        let (username, secret) = asked.map_err(|message| CredentialsError::Refused { message })?;
        let is_known = !(username.is_empty() && secret.is_empty());
        Ok(is_known.then_some(BasicCredentials { username, secret }))
    }

    async fn fetch_token(&self, _: &TokenRequest) -> Result<Option<Token>, CredentialsError> {
        Ok(None)
    }
}
