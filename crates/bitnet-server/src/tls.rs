//! HTTPS: a certificate and a key from PEM files.

use std::io;
use std::path::Path;
use std::sync::Arc;

use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};

/// Accepts TLS connections.
#[derive(Clone)]
pub struct Acceptor(TlsAcceptor);

impl Acceptor {
    /// Shakes hands on a connection.
    pub(crate) fn accept<S>(&self, stream: S) -> tokio_rustls::Accept<S>
    where
        S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
    {
        self.0.accept(stream)
    }
}

impl std::fmt::Debug for Acceptor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Acceptor")
    }
}

/// An acceptor for a chain of certificates, the server's own first, and its key.
///
/// # Errors
/// A file that cannot be read, is no PEM, or a key that does not fit the certificate.
pub(crate) fn acceptor(certificates: &Path, key: &Path) -> io::Result<Acceptor> {
    let in_file = |path: &Path, reason: &dyn std::fmt::Display| {
        io::Error::new(io::ErrorKind::InvalidData, format!("{}: {reason}", path.display()))
    };
    let chain: Vec<CertificateDer<'static>> = CertificateDer::pem_file_iter(certificates)
        .and_then(Iterator::collect)
        .map_err(|error| in_file(certificates, &error))?;
    let private = PrivateKeyDer::from_pem_file(key).map_err(|error| in_file(key, &error))?;
    let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .and_then(|builder| builder.with_no_client_auth().with_single_cert(chain, private))
        .map_err(|error| in_file(certificates, &error))?;
    Ok(Acceptor(TlsAcceptor::from(Arc::new(config))))
}
