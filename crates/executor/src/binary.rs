//! An OCI runtime such as runc or crun, fed with bundles.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;

use crate::error::{ExecutorError, RunError};
use crate::request::Stdio;
use crate::runtime::{Running, Runtime};
use crate::spec::{ContainerSpec, ProcessSpec};

/// Calls the program for each container.
#[derive(Debug)]
pub(crate) struct Binary {
    program: PathBuf,
}

impl Binary {
    pub(crate) fn new(program: &Path, _bundles: &Path) -> Result<Self, ExecutorError> {
        Ok(Self {
            program: program.to_owned(),
        })
    }
}

#[async_trait]
impl Runtime for Binary {
    async fn launch(
        &self,
        _spec: ContainerSpec,
        _attachment: Vec<u8>,
        _stdio: Stdio,
    ) -> Result<Arc<Running>, RunError> {
        Err(RunError::Invalid {
            message: format!("{} is not supported yet", self.program.display()),
        })
    }
    async fn join(
        &self,
        _container: &Running,
        _process: ProcessSpec,
        _stdio: Stdio,
    ) -> Result<Arc<Running>, RunError> {
        Err(RunError::Invalid {
            message: format!("{} is not supported yet", self.program.display()),
        })
    }
    fn kill(&self, _number: u64) {}
}
