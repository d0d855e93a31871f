//! Connected clients: the engine's session ports over gRPC.

mod connection;
mod content;
mod decisions;
mod packets;
mod streams;

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use api::session::SessionConn;
use async_trait::async_trait;
use engine::session::{Session, SessionError, SessionId, Sessions};
use tokio::sync::watch;
use tokio_util::task::TaskTracker;

use connection::Connection;

pub(crate) use packets::stat_to_wire;

/// How long a build waits for a client that is just connecting.
const CONNECT_WAIT: Duration = Duration::from_secs(5);
/// Sessions whose end is remembered.
const MAX_ENDED: usize = 64;

/// All connected clients. Cheap to clone.
#[derive(Clone, Debug)]
pub struct SessionTable(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    added: watch::Sender<u64>,
    /// Tasks that move bytes between clients and the engine; each ends with its stream or session.
    tasks: TaskTracker,
}

#[derive(Debug, Default)]
struct State {
    connected: BTreeMap<SessionId, Arc<Connection>>,
    ended: VecDeque<(SessionId, String)>,
}

impl Default for SessionTable {
    fn default() -> Self {
        let (added, _) = watch::channel(0);
        Self(Arc::new(Shared {
            state: Mutex::default(),
            added,
            tasks: TaskTracker::new(),
        }))
    }
}

impl SessionTable {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Offers a client's services to builds until it goes or stops to answer; says why it ended.
    ///
    /// Dropping the future ends the session, too.
    ///
    /// # Errors
    /// When a session of this id is connected already.
    pub async fn serve(&self, connection: SessionConn) -> Result<&'static str, SessionError> {
        let id = SessionId(connection.id.clone());
        let connection = Arc::new(Connection::new(connection, self.0.tasks.clone()));
        {
            let mut state = self.lock();
            if state.connected.contains_key(&id) {
                return Err(SessionError::Refused {
                    message: format!("session {id} already exists"),
                });
            }
            state.connected.insert(id.clone(), Arc::clone(&connection));
        }
        self.0.added.send_modify(|count| *count += 1);
        let mut entry = Entry {
            table: self.clone(),
            id,
            reason: "the client went away".to_owned(),
        };
        let reason = connection.watch().await;
        reason.clone_into(&mut entry.reason);
        Ok(reason)
    }

    fn remove(&self, id: &SessionId, reason: &str) {
        let mut state = self.lock();
        let connection = state.connected.remove(id);
        state.ended.push_back((id.clone(), reason.to_owned()));
        if state.ended.len() > MAX_ENDED {
            state.ended.pop_front();
        }
        drop(state);
        if let Some(connection) = connection {
            connection.end();
        }
    }

    fn missing(&self, id: &SessionId) -> SessionError {
        let state = self.lock();
        let ended = state.ended.iter().rev().find(|(ended, _)| ended == id);
        let reason = match ended {
            Some((_, reason)) => format!("it ended: {reason}"),
            None => format!("no client connected it within {} s", CONNECT_WAIT.as_secs()),
        };
        SessionError::NoSession {
            id: id.to_string(),
            reason,
        }
    }

    /// Waits until no bytes move any more; sessions have to be ended before.
    pub async fn drain(&self) {
        self.0.tasks.close();
        self.0.tasks.wait().await;
    }
}

/// A session's place in the table; dropping it gives the place up.
struct Entry {
    table: SessionTable,
    id: SessionId,
    reason: String,
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.table.remove(&self.id, &self.reason);
    }
}

#[async_trait]
impl Sessions for SessionTable {
    async fn get(&self, id: &SessionId) -> Result<Arc<dyn Session>, SessionError> {
        let mut added = self.0.added.subscribe();
        let search = async {
            loop {
                added.borrow_and_update();
                if let Some(session) = self.try_get(id) {
                    return Some(session);
                }
                if self.lock().ended.iter().any(|(ended, _)| ended == id) {
                    return None;
                }
                added.changed().await.ok()?;
            }
        };
        let found = tokio::time::timeout(CONNECT_WAIT, search).await.ok().flatten();
        found.ok_or_else(|| self.missing(id))
    }

    fn try_get(&self, id: &SessionId) -> Option<Arc<dyn Session>> {
        let connection = self.lock().connected.get(id).cloned()?;
        Some(connection)
    }
}
