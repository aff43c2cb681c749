//! Which of this machine's addresses the other workers meet it at.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use tokio::net::UdpSocket;

/// Why there is no such address.
#[derive(Debug, thiserror::Error)]
#[error(
    "--interface {name}: {cause}; take the name of one of this machine's interfaces, as `ip address` lists them, or one of its addresses"
)]
pub struct InterfaceError {
    name: String,
    cause: io::Error,
}

/// The address at `interface`, which is a name or an address itself; without one,
/// `here`, the address on the way to the coordinator.
///
/// # Errors
/// [`InterfaceError`] where this machine has no such interface or address.
pub(super) async fn address(
    interface: Option<&str>,
    here: IpAddr,
) -> Result<IpAddr, InterfaceError> {
    let Some(name) = interface else { return Ok(here) };
    let failed = |cause| InterfaceError { name: name.to_owned(), cause };
    if let Ok(address) = name.parse::<IpAddr>() {
        // Only an address of this machine can be bound.
        UdpSocket::bind((address, 0)).await.map_err(failed)?;
        return Ok(address);
    }
    let any: IpAddr = match here {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    // Connecting a datagram socket sends nothing: the system chooses the address from
    // which it would send, of the one interface that is left to it.
    let socket = UdpSocket::bind((any, 0)).await.map_err(failed)?;
    socket.bind_device(Some(name.as_bytes())).map_err(failed)?;
    socket.connect(SocketAddr::new(here, 9)).await.map_err(failed)?;
    Ok(socket.local_addr().map_err(failed)?.ip())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_interface_is_a_name_an_address_or_the_way_to_the_coordinator() {
        let here: IpAddr = "127.0.0.1".parse().unwrap();
        assert_eq!(address(None, here).await.unwrap(), here);
        assert_eq!(address(Some("lo"), here).await.unwrap(), here);
        let other: IpAddr = "127.0.0.2".parse().unwrap();
        assert_eq!(address(Some("127.0.0.2"), here).await.unwrap(), other);
        for missing in ["nonesuch0", "192.0.2.1"] {
            let message = address(Some(missing), here).await.unwrap_err().to_string();
            assert!(message.contains(missing) && message.contains("`ip address`"), "{message}");
        }
    }
}
