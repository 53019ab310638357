//! An image that somebody pushes into an import, piece by piece: what an upload is to the importer.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot};

use super::{Opened, Pieces, Place, changed};
use crate::{Error, ErrorKind, Result};

/// Pieces that may wait for the import; whoever sends more waits.
const PIECES_WAITING_MAX: usize = 16;
/// What the names of images end with that are neither decoded nor encoded.
const STORED_AS_IT_COMES: [&str; 6] = ["qcow2", "vmdk", "vdi", "vhdx", "ova", "iso"];
/// How the source is called in messages.
const SHOWN: &str = "the upload";

/// A piece, or the end: that all came, or why no more does.
type Piece = Result<Option<Bytes>>;

/// Makes a source, and the end where its bytes are put in.
///
/// `len` is the whole length in bytes, if known; `name` what the image calls itself; `id` names this upload and no other
/// one: an import that was broken off is gone on with for the same id alone.
pub fn feed(len: Option<u64>, name: Option<String>, id: String) -> (FeedWriter, Feed) {
    let (pieces, waiting) = mpsc::channel(PIECES_WAITING_MAX);
    let (tell_position, begun) = oneshot::channel();
    let intake = Mutex::new(Some(Intake { pieces: waiting, tell_position }));
    let feed = Feed(Arc::new(Inner { len, name, id, intake }));
    (FeedWriter { pieces, begun: Some(begun), position: 0 }, feed)
}

/// A source that is pushed into. It can be opened once.
#[derive(Clone)]
pub struct Feed(Arc<Inner>);

struct Inner {
    len: Option<u64>,
    name: Option<String>,
    id: String,
    intake: Mutex<Option<Intake>>,
}

/// Where the pieces come out.
struct Intake {
    pieces: mpsc::Receiver<Piece>,
    tell_position: oneshot::Sender<u64>,
}

impl Feed {
    /// Names this upload and no other one.
    pub(crate) fn id(&self) -> &str {
        &self.0.id
    }

    /// Its length, if its name says that it is stored as it comes; of what is named otherwise, its content will tell.
    pub(crate) fn stored_bytes(&self) -> Option<u64> {
        let (_, extension) = self.0.name.as_deref()?.rsplit_once('.')?;
        self.0.len.filter(|_| STORED_AS_IT_COMES.iter().any(|known| extension.eq_ignore_ascii_case(known)))
    }

    /// Opens it at its first byte, or where an import of the same upload was broken off.
    pub(crate) fn open(&self, at: Option<&Place>) -> Result<Opened> {
        let Inner { len, name, id, intake } = &*self.0;
        let is_beyond = |at: &Place| len.is_some_and(|len| at.position > len);
        if at.is_some_and(|at| at.validator != *id || is_beyond(at)) {
            return Err(changed(SHOWN));
        }
        let taken = intake.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(Intake { pieces, tell_position }) = taken else {
            let text = "what the registry had of the upload is lost, and its bytes are gone; send it again";
            return Err(Error::new(ErrorKind::Registry, text));
        };
        // A writer that is gone is noticed by the first read.
        let _ = tell_position.send(at.map_or(0, |at| at.position));
        Ok(Opened {
            reader: Box::new(Pieces::new(pieces, (ErrorKind::Source, "the upload broke off"))),
            random: None,
            len: *len,
            validator: Some(id.clone()),
            name: name.clone(),
            // Nobody vouches for what is uploaded, so that it is looked at.
            if_page: Some("upload the image itself"),
            shown: SHOWN.to_owned(),
            stamp: None,
            pump: None,
        })
    }
}

impl fmt::Debug for Feed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Feed").field("len", &self.0.len).field("id", &self.0.id).finish_non_exhaustive()
    }
}

impl PartialEq for Feed {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for Feed {}

/// The import takes no more: it has failed, or was stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused;

/// Puts bytes into a [`Feed`]. One that is dropped before [`FeedWriter::end`] makes the import fail.
#[derive(Debug)]
pub struct FeedWriter {
    pieces: mpsc::Sender<Piece>,
    begun: Option<oneshot::Receiver<u64>>,
    position: u64,
}

impl FeedWriter {
    /// Waits until the import opens the feed, and returns the position of the first byte that it wants.
    ///
    /// # Errors
    /// When the import ends before it does.
    pub async fn begin(&mut self) -> Result<u64, Refused> {
        if let Some(begun) = &mut self.begun {
            self.position = begun.await.map_err(|_| Refused)?;
            self.begun = None;
        }
        Ok(self.position)
    }

    /// The position of the byte that is sent next; right once [`FeedWriter::begin`] has returned.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// Puts bytes in; waits while the import is behind. Dropped while it waits, it has put nothing in.
    ///
    /// # Errors
    /// When the import takes no more; its own outcome tells why.
    pub async fn send(&mut self, piece: Bytes) -> Result<(), Refused> {
        let count = piece.len() as u64;
        self.pieces.send(Ok(Some(piece))).await.map_err(|_| Refused)?;
        self.position = self.position.saturating_add(count);
        Ok(())
    }

    /// Tells that all bytes are in.
    ///
    /// # Errors
    /// As [`FeedWriter::send`].
    pub async fn end(self) -> Result<(), Refused> {
        self.pieces.send(Ok(None)).await.map_err(|_| Refused)
    }

    /// Makes the import fail with `why`.
    pub async fn fail(self, why: Error) {
        // An import that has ended needs no reason.
        let _ = self.pieces.send(Err(why)).await;
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    /// Reads all of what was opened.
    async fn read(opened: Opened) -> io::Result<Vec<u8>> {
        let mut reader = opened.reader;
        let reading = tokio::task::spawn_blocking(move || {
            let mut all = Vec::new();
            reader.read_to_end(&mut all).map(|_| all)
        });
        reading.await.unwrap()
    }

    #[tokio::test]
    async fn what_is_put_in_comes_out_and_a_slow_reader_is_waited_for() {
        let (mut writer, feed) = feed(None, Some("a.img".into()), "x".into());
        let opened = feed.open(None).unwrap();
        assert_eq!((opened.len, opened.name.as_deref()), (None, Some("a.img")));
        assert_eq!(writer.begin().await, Ok(0));
        for _ in 0..PIECES_WAITING_MAX {
            writer.send(Bytes::from_static(b"ab")).await.unwrap();
        }
        let full = writer.pieces.try_reserve().is_err();
        assert!(full, "a reader that reads nothing holds up the writer");
        let reading = tokio::spawn(read(opened));
        writer.send(Bytes::from_static(b"c")).await.unwrap();
        assert_eq!(writer.position(), 2 * PIECES_WAITING_MAX as u64 + 1);
        writer.end().await.unwrap();
        let all = reading.await.unwrap().unwrap();
        assert_eq!(all, ["ab".repeat(PIECES_WAITING_MAX).as_bytes(), b"c"].concat());
    }

    #[tokio::test]
    async fn a_writer_that_vanishes_or_fails_is_no_end() {
        let (mut writer, vanishing) = feed(Some(9), None, "x".into());
        let opened = vanishing.open(None).unwrap();
        writer.send(Bytes::from_static(b"ab")).await.unwrap();
        drop(writer);
        assert!(read(opened).await.unwrap_err().to_string().contains("broke off"));

        let (writer, failing) = feed(Some(9), None, "x".into());
        let opened = failing.open(None).unwrap();
        writer.fail(Error::new(ErrorKind::Source, "nothing came")).await;
        assert!(read(opened).await.unwrap_err().to_string().contains("nothing came"));
    }

    #[tokio::test]
    async fn it_is_opened_once_and_gone_on_with_for_the_same_upload_alone() {
        let place = |validator: &str, position| Place { position, validator: validator.to_owned() };
        let (mut writer, feed) = feed(Some(9), None, "x".into());
        for wrong in [place("y", 4), place("x", 10)] {
            assert_eq!(feed.open(Some(&wrong)).err().unwrap().kind(), ErrorKind::Changed);
        }
        let opened = feed.open(Some(&place("x", 4))).unwrap();
        assert_eq!((writer.begin().await, opened.validator.as_deref()), (Ok(4), Some("x")));
        assert_eq!(writer.position(), 4);
        assert!(feed.open(None).is_err());
        drop(opened);
        assert_eq!(writer.send(Bytes::from_static(b"a")).await, Err(Refused));
    }
}
