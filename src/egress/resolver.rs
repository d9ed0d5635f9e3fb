//! Name resolution behind the address guard. It owns the rule that a name is refused as a whole
//! when any of its addresses is; it must not know why a name is looked up.
//!
//! The connector connects to exactly the addresses handed out here, so there is no second look-up
//! that an attacker could answer differently (DNS rebinding).

use std::{future::Future, io, net::SocketAddr, sync::Arc, time::Duration};

use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use tokio::{net::lookup_host, time::timeout};

use super::AddressGuard;

/// A system resolver that takes longer than this has failed.
const LOOK_UP: Duration = Duration::from_secs(5);

/// Resolves through the operating system and checks each address.
#[derive(Clone, Debug)]
pub struct GuardedResolver {
    guard: Arc<AddressGuard>,
    /// Behind a proxy the proxy resolves names: the only name looked up here is the proxy's own,
    /// which an operator chose and may well be private.
    proxy: Option<String>,
}

impl GuardedResolver {
    /// A resolver behind `guard`; `proxy` is the host name of the proxy in use.
    #[must_use]
    pub fn new(guard: Arc<AddressGuard>, proxy: Option<String>) -> Self {
        Self { guard, proxy }
    }
}

impl Resolve for GuardedResolver {
    fn resolve(&self, name: Name) -> Resolving {
        let this = self.clone();
        Box::pin(async move {
            let look_up = async { Ok(lookup_host((name.as_str(), 0)).await?.collect()) };
            Ok(Box::new(this.addresses(name.as_str(), look_up).await?.into_iter()) as Addrs)
        })
    }
}

impl GuardedResolver {
    /// The addresses of `name` as `look_up` finds them, if they may be connected to.
    async fn addresses(
        &self,
        name: &str,
        look_up: impl Future<Output = io::Result<Vec<SocketAddr>>>,
    ) -> io::Result<Vec<SocketAddr>> {
        let exempt = match &self.proxy {
            Some(proxy) if proxy.eq_ignore_ascii_case(name) => true,
            Some(_) => return Err(refused()),
            None => false,
        };
        let found =
            timeout(LOOK_UP, look_up).await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
        if exempt { Ok(found) } else { checked(&self.guard, found) }
    }
}

/// All of `addresses`, or an error when there is none or the guard refuses one of them.
fn checked(guard: &AddressGuard, addresses: Vec<SocketAddr>) -> io::Result<Vec<SocketAddr>> {
    if addresses.is_empty() || !addresses.iter().all(|address| guard.allows(address.ip())) {
        return Err(refused());
    }
    Ok(addresses)
}

fn refused() -> io::Error {
    io::Error::new(io::ErrorKind::PermissionDenied, "the name has no address that may be connected to")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(addresses: &[&str]) -> bool {
        let addresses = addresses.iter().map(|ip| SocketAddr::new(ip.parse().unwrap(), 443));
        checked(&AddressGuard::default(), addresses.collect()).is_ok()
    }

    #[test]
    fn a_name_with_one_private_address_is_refused_as_a_whole() {
        assert!(check(&["1.1.1.1", "2606:4700::1111"]));
        assert!(!check(&["1.1.1.1", "10.0.0.1"]));
        assert!(!check(&["::ffff:169.254.169.254", "1.1.1.1"]));
        assert!(!check(&[]));
    }

    #[tokio::test]
    async fn a_name_that_resolves_to_loopback_is_refused() {
        let resolver = GuardedResolver::new(Arc::default(), None);
        assert!(resolver.resolve("localhost".parse().unwrap()).await.is_err());
    }

    #[tokio::test]
    async fn a_name_that_is_public_and_private_in_turns_never_leads_to_a_private_address() {
        let resolver = GuardedResolver::new(Arc::default(), None);
        let [public, private] = ["1.1.1.1:0", "169.254.169.254:0"].map(|ip| ip.parse().unwrap());
        for number in 0..1000 {
            let found = if number % 2 == 0 { public } else { private };
            let allowed = resolver.addresses("rebinding.test", async { Ok(vec![found]) }).await;
            assert_eq!(allowed.ok(), (found == public).then(|| vec![public]));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_look_up_that_does_not_end_has_failed() {
        let resolver = GuardedResolver::new(Arc::default(), None);
        let started = tokio::time::Instant::now();
        let error = resolver.addresses("slow.test", std::future::pending()).await.unwrap_err();
        assert_eq!((error.kind(), started.elapsed()), (io::ErrorKind::TimedOut, LOOK_UP));
    }

    #[tokio::test]
    async fn behind_a_proxy_only_the_proxys_own_name_is_resolved() {
        let resolver = GuardedResolver::new(Arc::default(), Some("localhost".into()));
        assert!(resolver.resolve("localhost".parse().unwrap()).await.is_ok());
        assert!(resolver.resolve("example.com".parse().unwrap()).await.is_err());
    }
}
