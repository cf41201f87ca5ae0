// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Keys of one direction, and where the next ones come from.

use rustls::crypto::cipher::{AeadKey, Iv, MessageDecrypter, MessageEncrypter};
use rustls::kernel::KernelConnection;
use rustls::{ConnectionTrafficSecrets, Error, SupportedCipherSuite};
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

/// Keys of one direction, and the number of the next record under them.
pub(super) struct Keys {
    suite: SupportedCipherSuite,
    key: AeadKey,
    iv: Iv,
    pub(super) next: u64,
}

impl Keys {
    pub(super) fn new(
        suite: SupportedCipherSuite,
        (next, secrets): (u64, ConnectionTrafficSecrets),
    ) -> Result<Self, Error> {
        match secrets {
            ConnectionTrafficSecrets::Aes128Gcm { key, iv }
            | ConnectionTrafficSecrets::Aes256Gcm { key, iv }
            | ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => {
                Ok(Self { suite, key, iv, next })
            }
            _ => Err(Error::General("a cipher that is not known here".to_owned())),
        }
    }

    /// The version of TLS is 1.3, in which keys can be renewed.
    pub(super) fn can_be_renewed(&self) -> bool {
        self.suite.tls13().is_some()
    }

    /// Records after which keys have to be others.
    pub(super) fn most_records(&self) -> u64 {
        match self.suite {
            SupportedCipherSuite::Tls12(suite) => suite.common.confidentiality_limit,
            SupportedCipherSuite::Tls13(suite) => suite.common.confidentiality_limit,
        }
    }

    pub(super) fn encrypter(self) -> Box<dyn MessageEncrypter> {
        match self.suite {
            SupportedCipherSuite::Tls12(suite) => {
                let fixed = suite.aead_alg.key_block_shape().fixed_iv_len;
                let (iv, extra) = halves(&self.iv, fixed);
                suite.aead_alg.encrypter(self.key, iv, extra)
            }
            SupportedCipherSuite::Tls13(suite) => suite.aead_alg.encrypter(self.key, self.iv),
        }
    }

    pub(super) fn decrypter(self) -> Box<dyn MessageDecrypter> {
        match self.suite {
            SupportedCipherSuite::Tls12(suite) => {
                let fixed = suite.aead_alg.key_block_shape().fixed_iv_len;
                let (iv, _) = halves(&self.iv, fixed);
                suite.aead_alg.decrypter(self.key, iv)
            }
            SupportedCipherSuite::Tls13(suite) => suite.aead_alg.decrypter(self.key, self.iv),
        }
    }
}

fn halves(iv: &Iv, at: usize) -> (&[u8], &[u8]) {
    iv.as_ref().split_at_checked(at).unwrap_or((iv.as_ref(), &[]))
}

/// Where the next keys come from, and what one direction wants from the other.
pub(super) struct Renewal {
    connection: Mutex<Box<dyn Renewing>>,
    suite: SupportedCipherSuite,
    /// The other side wants new keys in both directions.
    is_wanted: AtomicBool,
}

/// A connection that makes new keys.
trait Renewing: Send {
    fn sending(&mut self) -> Result<(u64, ConnectionTrafficSecrets), Error>;
    fn receiving(&mut self) -> Result<(u64, ConnectionTrafficSecrets), Error>;
}

impl<Data> Renewing for KernelConnection<Data>
where
    Self: Send,
{
    fn sending(&mut self) -> Result<(u64, ConnectionTrafficSecrets), Error> {
        self.update_tx_secret()
    }

    fn receiving(&mut self) -> Result<(u64, ConnectionTrafficSecrets), Error> {
        self.update_rx_secret()
    }
}

impl Renewal {
    pub(super) fn new<Data>(connection: KernelConnection<Data>) -> Self
    where
        KernelConnection<Data>: Send + 'static,
    {
        let suite = connection.negotiated_cipher_suite();
        Self {
            connection: Mutex::new(Box::new(connection)),
            suite,
            is_wanted: AtomicBool::new(false),
        }
    }

    /// New keys to send with, after the other side has been told.
    pub(super) fn sending(&self) -> Result<Keys, Error> {
        let mut connection = self.connection.lock().unwrap_or_else(PoisonError::into_inner);
        Keys::new(self.suite, connection.sending()?)
    }

    /// New keys to receive with; the other side uses them already.
    pub(super) fn receiving(&self) -> Result<Keys, Error> {
        let mut connection = self.connection.lock().unwrap_or_else(PoisonError::into_inner);
        Keys::new(self.suite, connection.receiving()?)
    }

    /// The other side has to be answered with new keys.
    pub(super) fn want(&self) {
        self.is_wanted.store(true, Ordering::Release);
    }

    /// Whether it has; the caller does it then.
    pub(super) fn is_wanted(&self) -> bool {
        self.is_wanted.load(Ordering::Acquire) && self.is_wanted.swap(false, Ordering::AcqRel)
    }
}

impl fmt::Debug for Renewal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Renewal").field("suite", &self.suite.suite()).finish_non_exhaustive()
    }
}
