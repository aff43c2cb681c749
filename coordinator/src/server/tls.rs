//! A start's own certificates: an authority, the coordinator's and the workers',
//! made anew each time and void with the process.

use std::sync::Arc;

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio_rustls::rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use tokio_rustls::rustls::{
    CertificateError, Error, InvalidMessage, RootCertStore, ServerConfig, version,
};

use super::refusal::Refusal;

/// Why certificates could not be made.
#[derive(Debug, thiserror::Error)]
pub enum CertifyError {
    /// By `rcgen`.
    #[error("make the run's certificates: {0}")]
    Make(#[from] rcgen::Error),
    /// By `rustls`.
    #[error("use the run's certificates: {0}")]
    Use(#[from] Error),
    /// By the verifier of workers' certificates.
    #[error("use the run's authority: {0}")]
    Verify(#[from] tokio_rustls::rustls::server::VerifierBuilderError),
}

/// What the coordinator serves with and what its workers bring. The authority's
/// key is gone as soon as both are signed; the coordinator's stays in memory.
pub(super) struct Credentials {
    pub(super) server: Arc<ServerConfig>,
    pub(super) authority_pem: String,
    pub(super) worker_pem: String,
    pub(super) worker_key_pem: String,
}

impl Credentials {
    /// Makes them, the coordinator's for `names`: host names and IPs.
    ///
    /// # Errors
    /// A name that no certificate can have.
    pub(super) fn make(names: &[String]) -> Result<Self, CertifyError> {
        // Certificates without an end: they are void with the process, and the
        // clocks of a cluster's machines need not agree.
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "DRIFT run");
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let key = KeyPair::generate()?;
        let authority = params.self_signed(&key)?;
        let issuer = Issuer::new(params, key);

        let sign = |names: &[String], name: &str, usage| {
            let mut params = CertificateParams::new(names)?;
            params.distinguished_name.push(DnType::CommonName, name);
            params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
            params.extended_key_usages = vec![usage];
            let key = KeyPair::generate()?;
            let certificate = params.signed_by(&key, &issuer)?;
            Ok::<_, rcgen::Error>((certificate, key))
        };
        let (own, own_key) = sign(names, "DRIFT coordinator", ExtendedKeyUsagePurpose::ServerAuth)?;
        let (worker, worker_key) = sign(&[], "DRIFT worker", ExtendedKeyUsagePurpose::ClientAuth)?;
        Ok(Self {
            server: Arc::new(server(authority.der(), own.der(), &own_key)?),
            authority_pem: authority.pem(),
            worker_pem: worker.pem(),
            worker_key_pem: worker_key.serialize_pem(),
        })
    }
}

/// TLS 1.3 for HTTP/2, with a certificate on both sides and no session that
/// could be taken up again without one.
fn server(
    authority: &CertificateDer<'static>,
    own: &CertificateDer<'static>,
    own_key: &KeyPair,
) -> Result<ServerConfig, CertifyError> {
    let provider = Arc::new(ring::default_provider());
    let mut roots = RootCertStore::empty();
    roots.add(authority.clone())?;
    let verifier =
        WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
            .build()?;
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(own_key.serialize_der()));
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&version::TLS13])?
        .with_client_cert_verifier(verifier)
        .with_single_cert(vec![own.clone()], key)?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    Ok(config)
}

/// What a failed handshake says of the caller.
pub(super) fn refusal(error: &std::io::Error) -> Refusal {
    let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<Error>());
    match inner {
        Some(Error::NoCertificatesPresented) => Refusal::NoCertificate,
        Some(Error::InvalidCertificate(
            CertificateError::UnknownIssuer | CertificateError::BadSignature,
        )) => Refusal::StrangeCertificate,
        Some(Error::InvalidMessage(
            InvalidMessage::InvalidContentType | InvalidMessage::UnknownProtocolVersion,
        )) => Refusal::NotTls,
        Some(_) => Refusal::Handshake,
        None => Refusal::Left,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_in_pem_and_no_two_starts_have_the_same() {
        let names = ["node7".to_owned(), "10.1.2.3".to_owned(), "::1".to_owned()];
        let (one, two) = (Credentials::make(&names).unwrap(), Credentials::make(&names).unwrap());
        assert!(one.worker_key_pem.starts_with("-----BEGIN PRIVATE KEY-----"));
        assert!(one.authority_pem.starts_with("-----BEGIN CERTIFICATE-----"));
        assert_ne!(one.worker_key_pem, two.worker_key_pem);
        assert_ne!(one.authority_pem, two.authority_pem);
    }

    #[test]
    fn what_went_wrong_in_a_handshake_is_told_apart() {
        let told =
            |error: Error| refusal(&std::io::Error::new(std::io::ErrorKind::InvalidData, error));
        assert_eq!(told(Error::NoCertificatesPresented), Refusal::NoCertificate);
        let strange = Error::InvalidCertificate(CertificateError::UnknownIssuer);
        assert_eq!(told(strange), Refusal::StrangeCertificate);
        let garbage = Error::InvalidMessage(InvalidMessage::InvalidContentType);
        assert_eq!(told(garbage), Refusal::NotTls);
        assert_eq!(refusal(&std::io::ErrorKind::UnexpectedEof.into()), Refusal::Left);
    }
}
