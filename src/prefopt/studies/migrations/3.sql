-- Row digests, and an index from items to events.
ALTER TABLE setting ADD COLUMN seal BLOB;
ALTER TABLE sampling ADD COLUMN seal BLOB;
ALTER TABLE item ADD COLUMN seal BLOB;
ALTER TABLE annotator ADD COLUMN seal BLOB;
ALTER TABLE event ADD COLUMN seal BLOB;
CREATE INDEX event_on ON event (item);
