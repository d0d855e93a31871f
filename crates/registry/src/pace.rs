//! How many transfers a registry is asked for at once: fewer when it says that it is too much, more while they succeed.
//!
//! The rule is that of TCP. What is too much halves the number, once for all that was under way together; each round of
//! transfers that succeed adds one, up to the number that the client starts with. Transfers under way are left alone.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// The transfers from or to one domain.
#[derive(Debug)]
pub(crate) struct Lane {
    free: Arc<Semaphore>,
    most: usize,
    pace: Mutex<Pace>,
}

#[derive(Debug)]
struct Pace {
    /// Transfers that may be under way.
    allowed: usize,
    /// Transfers under way whose slots are not given away again.
    surplus: usize,
    /// Transfers of this round that succeeded.
    succeeded: usize,
    /// Begins anew whenever it is too much.
    round: u64,
}

impl Lane {
    /// Starts with `most` transfers, at least one.
    pub fn new(most: usize) -> Self {
        let most = most.max(1);
        Self {
            free: Arc::new(Semaphore::new(most)),
            most,
            pace: Mutex::new(Pace {
                allowed: most,
                surplus: 0,
                succeeded: 0,
                round: 0,
            }),
        }
    }

    /// Waits for the right to a transfer.
    pub async fn slot(self: Arc<Self>) -> Slot {
        let permit = Arc::clone(&self.free).acquire_owned().await;
        let round = self.pace().round;
        Slot {
            permit: Some(permit.expect("a lane's semaphore is never closed")),
            round: AtomicU64::new(round),
            lane: self,
        }
    }

    /// Transfers that may be under way.
    pub fn allowed(&self) -> usize {
        self.pace().allowed
    }

    fn pace(&self) -> MutexGuard<'_, Pace> {
        self.pace.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The right to a transfer; it ends when dropped.
#[derive(Debug)]
pub(crate) struct Slot {
    lane: Arc<Lane>,
    permit: Option<OwnedSemaphorePermit>,
    /// What the transfer met in an earlier round says nothing of this one.
    round: AtomicU64,
}

impl Slot {
    /// Notes that the registry was asked for too much.
    pub fn throttled(&self) {
        let mut pace = self.lane.pace();
        if self.round.load(Ordering::Relaxed) == pace.round {
            let fewer = (pace.allowed / 2).max(1);
            let cut = pace.allowed - fewer;
            pace.allowed = fewer;
            pace.surplus += cut - self.lane.free.forget_permits(cut);
            pace.succeeded = 0;
            pace.round += 1;
            tracing::debug!(transfers = fewer, "the registry is asked for less at once");
        }
        self.round.store(pace.round, Ordering::Relaxed);
    }

    /// Notes that the transfer is done.
    pub fn succeeded(&self) {
        let mut pace = self.lane.pace();
        if self.round.load(Ordering::Relaxed) != pace.round {
            return;
        }
        pace.succeeded += 1;
        if pace.succeeded < pace.allowed || pace.allowed == self.lane.most {
            return;
        }
        pace.succeeded = 0;
        pace.allowed += 1;
        match pace.surplus.checked_sub(1) {
            Some(fewer) => pace.surplus = fewer,
            None => self.lane.free.add_permits(1),
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut pace = self.lane.pace();
        if let Some(fewer) = pace.surplus.checked_sub(1)
            && let Some(permit) = self.permit.take()
        {
            pace.surplus = fewer;
            permit.forget();
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    /// A slot, if there is one right now.
    fn slot(lane: &Arc<Lane>) -> Option<Slot> {
        Arc::clone(lane).slot().now_or_never()
    }

    /// So many slots, and there are no more.
    fn all(lane: &Arc<Lane>, count: usize) -> Vec<Slot> {
        let slots: Vec<Slot> = (0..count).map_while(|_| slot(lane)).collect();
        assert_eq!(slots.len(), count);
        assert!(slot(lane).is_none(), "there are more than {count}");
        slots
    }

    #[test]
    fn too_much_halves_what_is_allowed_once_for_all_under_way() {
        let lane = Arc::new(Lane::new(8));
        let mut slots = all(&lane, 8);
        for slot in &slots {
            slot.throttled();
        }
        assert_eq!(lane.allowed(), 4);
        // Those above are not replaced.
        for _ in 0..4 {
            slots.pop();
            assert!(slot(&lane).is_none());
        }
        slots.pop();
        let last = slot(&lane).unwrap();
        assert!(slot(&lane).is_none());
        // What is too much again is too much for what is left.
        slots[0].throttled();
        last.throttled();
        assert_eq!(lane.allowed(), 2);
        drop((slots, last));
        drop(all(&lane, 2));
        // One is always allowed.
        for _ in 0..3 {
            slot(&lane).unwrap().throttled();
        }
        assert_eq!(lane.allowed(), 1);
        drop(all(&lane, 1));
    }

    #[test]
    fn each_round_that_succeeds_allows_one_more_up_to_where_it_began() {
        let lane = Arc::new(Lane::new(4));
        // Free slots are taken away at once.
        slot(&lane).unwrap().throttled();
        assert_eq!(lane.allowed(), 2);
        for (round, before) in [(2, 2), (3, 3), (9, 4)] {
            assert_eq!(lane.allowed(), before);
            drop(all(&lane, before));
            for _ in 0..round {
                slot(&lane).unwrap().succeeded();
            }
        }
        assert_eq!(lane.allowed(), 4);
        drop(all(&lane, 4));
    }

    #[test]
    fn what_began_before_it_was_too_much_adds_nothing() {
        let lane = Arc::new(Lane::new(4));
        let slots = all(&lane, 4);
        slots[0].throttled();
        for slot in &slots[1..] {
            slot.succeeded();
        }
        assert_eq!(lane.allowed(), 2);
        slots[0].succeeded();
        drop(slots);
        let last = slot(&lane).unwrap();
        last.succeeded();
        assert_eq!(lane.allowed(), 3);
        drop(last);
        drop(all(&lane, 3));
    }
}
