-- The proof: any row returned is a broken law, and fails the drain.
-- Witnesses, read afresh into temporary tables: logged(source, part, place, pos) from the DLQ's log,
-- archived(source, part, place, payload_sha) from the segments, delivered(job, ordinal, n) from the target, read committed.
SELECT 'range gap or overlap' AS law, r.source || '/' || r.part AS what, r.from_pos AS n
  FROM (SELECT intake.*, LAG(to_pos) OVER (PARTITION BY source, part ORDER BY round) AS prev FROM intake WHERE from_pos IS NOT NULL) r
  JOIN source s ON s.id = r.source AND s.queue = :queue
 WHERE r.prev IS NOT NULL AND r.from_pos <> r.prev
UNION ALL
SELECT 'cut-off not reached', source || '/' || part, MAX(cutoff) - MAX(COALESCE(to_pos, from_pos, -1))
  FROM intake WHERE drain = :drain AND cutoff IS NOT NULL GROUP BY source, part HAVING MAX(COALESCE(to_pos, from_pos, -1)) < MAX(cutoff)
UNION ALL
SELECT 'in the log, not in the ledger', l.source || '/' || l.part, l.pos FROM logged l
 WHERE NOT EXISTS (SELECT 1 FROM entry e WHERE e.source = l.source AND e.part = l.part AND e.place = l.place)
UNION ALL
SELECT 'taken outside of any range', e.part || '/' || e.place, e.id FROM entry e
 WHERE e.taken_drain = :drain AND e.pos IS NOT NULL
   AND NOT EXISTS (SELECT 1 FROM intake i WHERE i.source = e.source AND i.part = e.part AND e.pos >= i.from_pos AND e.pos < i.to_pos)
UNION ALL
SELECT 'in the ledger, not in the archive', e.part || '/' || e.place, e.id FROM entry e
 WHERE e.queue = :queue AND (e.taken_drain = :drain OR e.settled_drain IS NULL)
   AND NOT EXISTS (SELECT 1 FROM archived a WHERE a.source = e.source AND a.part = e.part AND a.place = e.place AND a.payload_sha = e.payload_sha)
UNION ALL
SELECT 'in the archive, not in the ledger', a.part || '/' || a.place, 1 FROM archived a
 WHERE NOT EXISTS (SELECT 1 FROM entry e WHERE e.source = a.source AND e.part = a.part AND e.place = a.place)
UNION ALL
SELECT 'before + taken <> settled + unsettled', b.id, b.diff
  FROM (SELECT d.id, d.open_before + (SELECT COUNT(*) FROM entry WHERE taken_drain = d.id) - (SELECT COUNT(*) FROM entry WHERE settled_drain = d.id)
                - (SELECT COUNT(*) FROM entry WHERE queue = d.queue AND settled_drain IS NULL) AS diff
          FROM drain d WHERE d.id = :drain) b WHERE b.diff <> 0
UNION ALL
SELECT 'settled as sent, not once on the target', je.job, je.ordinal FROM job_entry je
  JOIN witnessed w ON w.job = je.job
  JOIN entry e ON e.id = je.entry AND e.job = je.job
  LEFT JOIN delivered d ON d.job = je.job AND d.ordinal = je.ordinal
 WHERE e.state IN ('replayed', 'confirmed', 'returned', 'handed_back') AND COALESCE(d.n, 0) <> 1
UNION ALL
SELECT 'on the target, not settled as sent', d.job, d.ordinal FROM delivered d
  LEFT JOIN job_entry je ON je.job = d.job AND je.ordinal = d.ordinal
  LEFT JOIN entry e ON e.id = je.entry
 WHERE e.id IS NULL OR e.job IS NULL OR e.job <> d.job OR e.state NOT IN ('replayed', 'confirmed', 'returned', 'handed_back', 'ambiguous')
UNION ALL
SELECT 'unfinished at close', state, COUNT(*) FROM entry WHERE queue = :queue AND state IN ('planned', 'sending') GROUP BY state
UNION ALL
SELECT 'return without its new entry', e.part || '/' || e.place, e.id FROM entry e
 WHERE e.queue = :queue AND e.state = 'returned' AND NOT EXISTS (SELECT 1 FROM entry r WHERE r.return_of = e.id)
UNION ALL
SELECT 'duplicate of something never sent', e.part || '/' || e.place, e.id FROM entry e
 WHERE e.queue = :queue AND e.state = 'duplicate'
   AND NOT EXISTS (SELECT 1 FROM entry t WHERE t.id = e.duplicate_of AND t.payload_sha = e.payload_sha AND t.state IN ('replayed', 'confirmed', 'returned'))
UNION ALL
SELECT 'open without a reason', e.part || '/' || e.place, e.id FROM entry e
 WHERE e.queue = :queue AND e.state = 'open' AND e.reason = 'new'
