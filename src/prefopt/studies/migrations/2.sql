-- The queue, in which the next item is found without counting votes.
CREATE TABLE queue (
    item INTEGER PRIMARY KEY REFERENCES item (id),
    taken INTEGER NOT NULL DEFAULT 0,
    votes INTEGER NOT NULL DEFAULT 0,
    fresh INTEGER NOT NULL DEFAULT 1,
    place INTEGER
);
CREATE INDEX queue_fresh ON queue (item) WHERE fresh = 1;
CREATE INDEX queue_waiting ON queue (place) WHERE place IS NOT NULL;
ALTER TABLE annotator ADD COLUMN cursor INTEGER NOT NULL DEFAULT 0;
ALTER TABLE annotator ADD COLUMN seen INTEGER NOT NULL DEFAULT 0;
CREATE UNIQUE INDEX assignment_ticket ON assignment (ticket);
CREATE INDEX assignment_latest ON assignment (annotator, event) WHERE event IS NOT NULL;
