//! What the sources under test import of tokio, tokio-util, arc-swap and jsonwebtoken, as a schedule's own: its tasks,
//! its clock, its points where another task may go on.

use std::{
    ops::{Deref, DerefMut},
    sync::{Arc, PoisonError},
};

use shuttle::sync::Mutex;

/// What an onlooker knows of a schedule: a lock that is none of its points.
#[derive(Debug, Default)]
#[expect(clippy::disallowed_types, reason = "it is the one that is meant")]
pub struct Seen<T>(std::sync::Mutex<T>);

impl<T> Seen<T> {
    /// Of what it knows at first.
    pub fn new(known: T) -> Self {
        Self(known.into())
    }

    /// To be let go before another task may go on.
    pub fn lock(&self) -> impl DerefMut<Target = T> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// As `tokio::sync`: tokio's own, which needs no runtime.
pub mod sync {
    pub use tokio::sync::watch;
}

/// As `tokio::time`: a clock that stands still unless a model moves it.
pub mod time {
    use std::{
        cell::Cell,
        ops::{Add, Sub},
        time::Duration,
    };

    thread_local! {
        static NOW: Cell<Duration> = const { Cell::new(Duration::ZERO) };
    }

    /// Time since the schedule began.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
    pub struct Instant(Duration);

    impl Instant {
        /// What the clock says.
        #[must_use]
        pub fn now() -> Self {
            Self(NOW.get())
        }

        /// How long ago it was.
        #[must_use]
        pub fn elapsed(self) -> Duration {
            Self::now() - self
        }

        /// How long after `earlier` it is; nothing if it is not.
        #[must_use]
        pub fn saturating_duration_since(self, earlier: Self) -> Duration {
            self - earlier
        }
    }

    impl Add<Duration> for Instant {
        type Output = Self;

        fn add(self, time: Duration) -> Self {
            Self(self.0 + time)
        }
    }

    impl Sub for Instant {
        type Output = Duration;

        fn sub(self, earlier: Self) -> Duration {
            self.0.saturating_sub(earlier.0)
        }
    }

    /// Lets time pass at once.
    pub fn advance(time: Duration) {
        NOW.set(NOW.get() + time);
    }

    /// A schedule begins.
    pub fn begin() {
        NOW.set(Duration::ZERO);
    }
}

/// As `tokio_util::task`.
pub mod task {
    use std::{
        future::{Future, poll_fn},
        panic::{AssertUnwindSafe, catch_unwind},
        sync::Arc,
        task::Poll,
    };

    use shuttle::future::{JoinHandle, spawn};

    use crate::Seen;

    /// Spawns tasks of the schedule. One that panics ends alone, as on tokio.
    #[derive(Clone, Default)]
    pub struct TaskTracker(Arc<Seen<Vec<JoinHandle<()>>>>);

    impl TaskTracker {
        /// A tracker of no tasks yet.
        #[must_use]
        pub fn new() -> Self {
            Self::default()
        }

        /// Runs `future` as a task.
        pub fn spawn(&self, future: impl Future<Output = ()> + Send + 'static) {
            let mut future = Box::pin(future);
            let handle = spawn(async move {
                poll_fn(|context| {
                    let poll = catch_unwind(AssertUnwindSafe(|| future.as_mut().poll(context)));
                    poll.unwrap_or(Poll::Ready(()))
                })
                .await;
                // Not before what it owns has been dropped is it over.
                drop(future);
            });
            self.0.lock().push(handle);
        }

        /// Drops all tasks where they are, as a runtime that shuts down does.
        pub fn abort(&self) {
            let handles: Vec<_> = self.0.lock().iter().map(JoinHandle::abort_handle).collect();
            handles.iter().for_each(shuttle::future::AbortHandle::abort);
        }

        /// Returns when no task is left.
        pub async fn wait(&self) {
            loop {
                let last = self.0.lock().pop();
                let Some(handle) = last else { return };
                // Aborted ones are over as well.
                let _ = handle.await;
            }
        }
    }
}

/// As `arc_swap::ArcSwapOption`: another task may go on before and after each access.
pub struct ArcSwapOption<T>(Mutex<Option<Arc<T>>>);

/// As `arc_swap::ArcSwap`, likewise.
#[derive(Debug)]
pub struct ArcSwap<T>(Mutex<Arc<T>>);

impl<T> ArcSwap<T> {
    /// With `value` in it.
    pub fn from_pointee(value: T) -> Self {
        Self(Mutex::new(Arc::new(value)))
    }

    /// The value in use.
    #[must_use]
    pub fn load_full(&self) -> Arc<T> {
        Arc::clone(&self.lock())
    }

    /// The value in use.
    #[must_use]
    pub fn load(&self) -> Guard<Arc<T>> {
        Guard(self.load_full())
    }

    /// Puts `value` in the place of the one in use.
    pub fn store(&self, value: Arc<T>) {
        *self.lock() = value;
    }

    fn lock(&self) -> shuttle::sync::MutexGuard<'_, Arc<T>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// As `aws_lc_rs::hmac`: no secret, but another for another key and message.
pub mod hmac {
    use std::hash::{DefaultHasher, Hash, Hasher};

    /// SHA-256 in name.
    pub const HMAC_SHA256: () = ();

    /// What digests are made with.
    #[derive(Clone)]
    pub struct Key(Vec<u8>);

    impl Key {
        /// Of `secret`.
        #[must_use]
        pub fn new((): (), secret: &[u8]) -> Self {
            Self(secret.to_vec())
        }
    }

    /// A digest of `message`.
    #[must_use]
    pub fn sign(key: &Key, message: &[u8]) -> [u8; 32] {
        let mut hasher = DefaultHasher::new();
        (&key.0, message).hash(&mut hasher);
        let mut digest = [0; 32];
        digest[..8].copy_from_slice(&hasher.finish().to_be_bytes());
        digest
    }
}

/// As `jsonwebtoken::DecodingKey`: which download it came from.
pub struct DecodingKey(pub u64);

/// What a load brought.
pub struct Guard<T>(T);

impl<T> ArcSwapOption<T> {
    /// Without a value.
    #[must_use]
    pub fn empty() -> Self {
        Self(Mutex::new(None))
    }

    /// The value in use.
    #[must_use]
    pub fn load_full(&self) -> Option<Arc<T>> {
        self.lock().clone()
    }

    /// The value in use.
    #[must_use]
    pub fn load(&self) -> Guard<Option<Arc<T>>> {
        Guard(self.load_full())
    }

    /// Puts `value` in the place of the one in use.
    pub fn store(&self, value: Option<Arc<T>>) {
        *self.lock() = value;
    }

    fn lock(&self) -> shuttle::sync::MutexGuard<'_, Option<Arc<T>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T> Deref for Guard<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}
