//! Network namespaces made before they are needed, and taken back by somebody who has the time.
//!
//! A namespace is used by one container and then released: the next one must find nothing of it. A thread keeps some
//! ready and releases what comes back; it ends, with everything released, when the pool is dropped.

use std::fmt;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use super::NetworkError;

/// A namespace that is ready to be used.
pub(super) trait Lease: fmt::Debug + Send + Sync {
    /// Returns the namespace.
    fn namespace(&self) -> BorrowedFd<'_>;

    /// Gives back what was made for it. Blocking; failures are logged.
    fn release(self: Box<Self>);
}

/// Makes namespaces.
pub(super) trait Provider: fmt::Debug + Send + Sync {
    /// Whether namespaces differ by the host name of their container.
    fn knows_hostnames(&self) -> bool {
        false
    }

    /// Makes one, for a container of a host name if it matters. Blocking.
    fn make(&self, hostname: &str) -> Result<Box<dyn Lease>, NetworkError>;

    /// Removes what all of them shared; none is left. Blocking; failures are logged.
    fn close(&self);
}

/// Keeps namespaces. Closing it waits until all are released; dropping it, too, and then nobody uses one any more.
#[derive(Debug)]
pub(super) struct Pool {
    shared: Arc<Shared>,
    keeper: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    provider: Box<dyn Provider>,
    /// How many are kept ready.
    target: usize,
    state: Mutex<State>,
    wake: Condvar,
    /// Wakes those who wait for the end.
    ended: Condvar,
}

#[derive(Debug, Default)]
struct State {
    ready: Vec<Box<dyn Lease>>,
    returned: Vec<Box<dyn Lease>>,
    /// How many are being made for somebody, or used.
    lent: usize,
    is_closed: bool,
    /// Whether all is released.
    has_ended: bool,
    /// Whether making one ahead of time failed; whoever needs one will be told why.
    has_failed: bool,
}

/// What the keeper does next.
enum Duty {
    Make,
    Release(Box<dyn Lease>),
    End,
}

/// A namespace of the pool in use, or one that is being made for that; given back when dropped.
#[derive(Debug)]
pub(crate) struct Pooled {
    lease: Option<Box<dyn Lease>>,
    /// Also keeps the pool: it is closed after the last of its namespaces came back.
    pool: Arc<Pool>,
}

impl Pooled {
    /// Returns the namespace.
    pub(super) fn namespace(&self) -> Option<BorrowedFd<'_>> {
        self.lease.as_ref().map(|lease| lease.namespace())
    }
}

impl Drop for Pooled {
    fn drop(&mut self) {
        {
            let mut state = self.pool.shared.state();
            state.returned.extend(self.lease.take());
            state.lent -= 1;
        }
        self.pool.shared.wake.notify_one();
    }
}

impl Pool {
    /// Makes the first namespace, to see that it can be done, and starts the keeper. Blocking.
    pub(super) fn start(provider: Box<dyn Provider>, target: usize) -> Result<Arc<Self>, NetworkError> {
        let first = match provider.make("") {
            Ok(first) => first,
            Err(error) => {
                provider.close();
                return Err(error);
            }
        };
        let state = State {
            ready: vec![first],
            ..State::default()
        };
        let shared = Arc::new(Shared {
            provider,
            target,
            state: Mutex::new(state),
            wake: Condvar::new(),
            ended: Condvar::new(),
        });
        let keeping = Arc::clone(&shared);
        let keeper = std::thread::Builder::new()
            .name("networks".to_owned())
            .spawn(move || keeping.keep());
        match keeper {
            Ok(keeper) => Ok(Arc::new(Self {
                shared,
                keeper: Some(keeper),
            })),
            Err(source) => {
                shared.state().is_closed = true;
                shared.keep();
                Err(NetworkError::System {
                    action: "start a thread".to_owned(),
                    source,
                })
            }
        }
    }

    /// Takes a namespace, one that is ready if there is any. A caller that goes away meanwhile leaves nothing behind.
    pub(super) async fn take(self: &Arc<Self>, hostname: &str) -> Result<Pooled, NetworkError> {
        let hostname = if self.shared.provider.knows_hostnames() {
            hostname.to_owned()
        } else {
            String::new()
        };
        let mut pooled = self.lend(&hostname)?;
        self.shared.wake.notify_one();
        if pooled.lease.is_some() {
            return Ok(pooled);
        }
        let made = tokio::task::spawn_blocking(move || {
            pooled.lease = Some(pooled.pool.shared.make(&hostname)?);
            Ok(pooled)
        });
        made.await.map_err(|error| NetworkError::System {
            action: "make a network namespace".to_owned(),
            source: std::io::Error::other(error),
        })?
    }

    /// Lends one that is ready; if there is none of that host name, the place of one.
    fn lend(self: &Arc<Self>, hostname: &str) -> Result<Pooled, NetworkError> {
        let mut state = self.shared.state();
        if state.is_closed {
            return Err(NetworkError::Closed);
        }
        state.has_failed = false;
        state.lent += 1;
        let lease = if hostname.is_empty() {
            state.ready.pop()
        } else {
            None
        };
        drop(state);
        Ok(Pooled {
            lease,
            pool: Arc::clone(self),
        })
    }

    /// Lends nothing any more, and waits until what is lent or being made came back and all is released. Blocking. Of
    /// several callers each waits.
    pub(super) fn close(&self) {
        let mut state = self.shared.state();
        state.is_closed = true;
        self.shared.wake.notify_one();
        while !state.has_ended {
            state = self
                .shared
                .ended
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.state().is_closed = true;
        self.shared.wake.notify_one();
        if let Some(keeper) = self.keeper.take() {
            // It panics only if a provider does, and there is nothing more to clean up then.
            let _ = keeper.join();
        }
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes one; when that fails, again after what came back is released: it may have been the last address.
    fn make(&self, hostname: &str) -> Result<Box<dyn Lease>, NetworkError> {
        let error = match self.provider.make(hostname) {
            Err(error) => error,
            made => return made,
        };
        let returned = std::mem::take(&mut self.state().returned);
        if returned.is_empty() {
            return Err(error);
        }
        for lease in returned {
            lease.release();
        }
        self.provider.make(hostname)
    }

    /// Releases what came back and keeps enough ready until the pool is closed.
    fn keep(&self) {
        loop {
            match self.next_duty() {
                Duty::Release(lease) => lease.release(),
                Duty::Make => {
                    let made = self.provider.make("");
                    let mut state = self.state();
                    match made {
                        Ok(lease) => state.ready.push(lease),
                        Err(error) => {
                            tracing::warn!(%error, "cannot make a network namespace ahead of time");
                            state.has_failed = true;
                        }
                    }
                }
                Duty::End => {
                    self.provider.close();
                    self.state().has_ended = true;
                    self.ended.notify_all();
                    return;
                }
            }
        }
    }

    fn next_duty(&self) -> Duty {
        let mut state = self.state();
        loop {
            // First: a step may wait for one.
            if !state.is_closed && state.ready.len() < self.target && !state.has_failed {
                return Duty::Make;
            }
            if let Some(lease) = state.returned.pop() {
                return Duty::Release(lease);
            }
            if state.is_closed {
                match state.ready.pop() {
                    Some(lease) => return Duty::Release(lease),
                    None if state.lent == 0 => return Duty::End,
                    None => {}
                }
            }
            state = self.wake.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsFd as _, OwnedFd};
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    /// Counts what exists.
    #[derive(Debug, Default)]
    struct Counts {
        alive: AtomicUsize,
        made: AtomicUsize,
        closed: AtomicUsize,
        is_broken: std::sync::atomic::AtomicBool,
    }

    #[derive(Debug)]
    struct Fake(Arc<Counts>);

    #[derive(Debug)]
    struct FakeLease(OwnedFd, Arc<Counts>);

    impl Provider for Fake {
        fn make(&self, _: &str) -> Result<Box<dyn Lease>, NetworkError> {
            if self.0.is_broken.load(Ordering::SeqCst) {
                return Err(NetworkError::Invalid {
                    message: "broken".to_owned(),
                });
            }
            self.0.made.fetch_add(1, Ordering::SeqCst);
            self.0.alive.fetch_add(1, Ordering::SeqCst);
            let file = std::fs::File::open("/dev/null").unwrap();
            Ok(Box::new(FakeLease(file.into(), Arc::clone(&self.0))))
        }

        fn close(&self) {
            assert_eq!(self.0.alive.load(Ordering::SeqCst), 0);
            self.0.closed.fetch_add(1, Ordering::SeqCst);
        }
    }

    impl Lease for FakeLease {
        fn namespace(&self) -> BorrowedFd<'_> {
            self.0.as_fd()
        }

        fn release(self: Box<Self>) {
            self.1.alive.fetch_sub(1, Ordering::SeqCst);
        }
    }

    fn start(target: usize) -> (Arc<Counts>, Arc<Pool>) {
        let counts = Arc::new(Counts::default());
        let pool = Pool::start(Box::new(Fake(Arc::clone(&counts))), target).unwrap();
        (counts, pool)
    }

    #[tokio::test]
    async fn closing_waits_for_what_is_lent_and_lends_nothing_more() {
        let (counts, pool) = start(3);
        let hold = pool.take("").await.unwrap();
        let closing = {
            let pool = Arc::clone(&pool);
            tokio::task::spawn_blocking(move || pool.close())
        };
        while !pool.shared.state().is_closed {
            tokio::task::yield_now().await;
        }
        assert!(matches!(pool.take("").await, Err(NetworkError::Closed)));
        assert_eq!(counts.closed.load(Ordering::SeqCst), 0);
        assert!(!closing.is_finished());
        drop(hold);
        closing.await.unwrap();
        assert_eq!(counts.alive.load(Ordering::SeqCst), 0);
        assert_eq!(counts.closed.load(Ordering::SeqCst), 1);
        // Again, and by dropping it: nothing more happens.
        pool.close();
        drop(pool);
        assert_eq!(counts.closed.load(Ordering::SeqCst), 1);
    }

    #[tokio::test]
    async fn everything_is_released_and_closed_once() {
        let (counts, pool) = start(3);
        let mut holds = Vec::new();
        for _ in 0..10 {
            holds.push(pool.take("").await.unwrap());
        }
        assert!(holds.iter().all(|hold| hold.namespace().is_some()));
        assert!(counts.alive.load(Ordering::SeqCst) >= 10);
        // The pool outlives its handle as long as something of it is used.
        drop(pool);
        assert_eq!(counts.closed.load(Ordering::SeqCst), 0);
        drop(holds);
        assert_eq!(counts.alive.load(Ordering::SeqCst), 0);
        assert_eq!(counts.closed.load(Ordering::SeqCst), 1);
    }

    #[tokio::test]
    async fn a_namespace_is_never_used_twice() {
        let (counts, pool) = start(1);
        for _ in 0..5 {
            drop(pool.take("").await.unwrap());
        }
        drop(pool);
        assert!(counts.made.load(Ordering::SeqCst) >= 5);
    }

    #[tokio::test]
    async fn a_failure_is_told_to_whoever_needs_one() {
        let (counts, pool) = start(0);
        let first = pool.take("").await.unwrap();
        counts.is_broken.store(true, Ordering::SeqCst);
        assert!(pool.take("").await.is_err());
        counts.is_broken.store(false, Ordering::SeqCst);
        assert!(pool.take("").await.is_ok());
        drop((first, pool));
        assert_eq!(counts.closed.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn one_that_cannot_start_is_closed() {
        let counts = Arc::new(Counts::default());
        counts.is_broken.store(true, Ordering::SeqCst);
        assert!(Pool::start(Box::new(Fake(Arc::clone(&counts))), 1).is_err());
        assert_eq!(counts.closed.load(Ordering::SeqCst), 1);
    }
}
