package bench;

import com.fasterxml.jackson.core.JsonFactory;
import com.fasterxml.jackson.core.JsonGenerator;
import com.fasterxml.jackson.databind.ObjectMapper;
import io.grpc.CallOptions;
import io.grpc.ManagedChannel;
import io.grpc.MethodDescriptor;
import io.grpc.netty.shaded.io.grpc.netty.NettyChannelBuilder;
import io.grpc.stub.ClientCalls;
import io.grpc.stub.StreamObserver;
import java.io.ByteArrayInputStream;
import java.io.ByteArrayOutputStream;
import java.io.IOException;
import java.io.InputStream;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.charset.StandardCharsets;
import java.security.MessageDigest;
import java.security.NoSuchAlgorithmException;
import java.time.Duration;
import java.util.ArrayDeque;
import java.util.ArrayList;
import java.util.List;
import java.util.Properties;
import java.util.concurrent.CountDownLatch;
import java.util.zip.CRC32;
import org.apache.kafka.clients.consumer.ConsumerConfig;
import org.apache.kafka.clients.producer.ProducerConfig;
import org.apache.kafka.common.serialization.Serdes;
import org.apache.kafka.streams.KafkaStreams;
import org.apache.kafka.streams.StreamsConfig;
import org.apache.kafka.streams.Topology;
import org.apache.kafka.streams.processor.PunctuationType;
import org.apache.kafka.streams.processor.api.Processor;
import org.apache.kafka.streams.processor.api.ProcessorContext;
import org.apache.kafka.streams.processor.api.ProcessorSupplier;
import org.apache.kafka.streams.processor.api.Record;
import org.apache.kafka.streams.state.KeyValueStore;
import org.apache.kafka.streams.state.StoreBuilder;
import org.apache.kafka.streams.state.Stores;

/**
 * Kafka Streams (Processor API, RocksDB store with record cache and changelog) that stays up until it is stopped.
 * tests/bench/kstreams.py compiles it with the peers' harness, whose Main has the event, the window and its processor.
 *
 * <p>JOB=window: the harness's job and message. JOB=triton: each record's window is scored by the same Triton model as
 * ours, and answered with a message that has all fields of our scores.updated.
 *
 * <p>What JOB=triton does less than our worker, each time in Kafka Streams' favour:
 *
 * <ul>
 *   <li>The tensors have the names, types, shapes and padding of ours. Their values are simplified: a slot for each
 *       event, and few counters. The calls are what counts.
 *   <li>A user begins with a made-up window of WINDOW events, made in memory. Ours restores it and reads RocksDB.
 *   <li>MODE=async: process() only changes the store and queues the row. Rows that wait are sent together, as many as
 *       one request takes, while at most IN_FLIGHT requests are unanswered; a punctuator forwards what is answered,
 *       in order. Nothing holds back the commit until then: after a crash, outputs may be missing. The Processor API
 *       has no hook before a commit. MODE=sync waits in process() for each answer, which loses nothing.
 *   <li>No alerts, no reasons, no timers, no dead letters, no checks of the answer, no retries.
 * </ul>
 */
public final class Steady {
    static final int EVENTS_MAX = 128, SLOTS_MAX = 64, SLOT_NUMBERS = 7, ROWS_MAX = 256;
    static final int[] LENGTHS = {8, 16, 32, 64};
    static final int EVENT_BYTES = 8 + 1 + 4 + 4 + 4;
    static final int HEAD_BYTES = 8 + 8 + 4 + 8 + 4 * 15;       // offsets, applied, first seen, counts by type
    static final String[] TYPES = {"", "view", "click", "search", "favorite", "follow", "share", "login", "rating",
        "review", "add_to_cart", "remove_from_cart", "purchase", "refund"};
    static final String[] INPUTS = {"categories", "numbers", "counters", "row_id"};
    static final String[] KINDS = {"INT32", "FP32", "FP32", "INT64"};

    static String env(String name, String otherwise) { return Main.env(name, otherwise); }

    // ---- the window: head, then the events, oldest first ----------------------------------------------------------

    static int code(String type) {
        for (int i = 1; i < TYPES.length; i++) if (TYPES[i].equals(type)) return i;
        return 14;
    }

    static int hash(byte[] text) {
        CRC32 crc = new CRC32();
        crc.update(text, 0, text.length);
        return (int) (crc.getValue() & 0x7FFFFFFF);
    }

    /** A user's first window, of events in the days before. */
    static byte[] madeUp(byte[] key, long now, int events) {
        ByteBuffer made = ByteBuffer.allocate(HEAD_BYTES + events * EVENT_BYTES);
        long step = 3_600_000L * 7, first = now - step * events;
        made.putLong(0).putLong(0).putInt(events).putLong(first);
        int seed = hash(key);
        made.position(HEAD_BYTES);
        for (int i = 0; i < events; i++) {
            seed = seed * 1103515245 + 12345;
            int kind = (seed >>> 16) % 5 == 0 ? 10 : 1;
            made.putInt(28 + 4 * kind, made.getInt(28 + 4 * kind) + 1);
            made.putLong(first + step * i).put((byte) kind).putInt(seed & 0x7FFFFFFF).putInt(seed & 0xFFFF).putFloat(9.9f);
        }
        return made.array();
    }

    static byte[] append(byte[] window, Main.Event e, boolean carts, long offset) {
        int events = (window.length - HEAD_BYTES) / EVENT_BYTES;
        int dropped = Math.max(events + 1 - EVENTS_MAX, 0);
        ByteBuffer made = ByteBuffer.allocate(HEAD_BYTES + (events + 1 - dropped) * EVENT_BYTES);
        made.put(window, 0, HEAD_BYTES);
        made.put(window, HEAD_BYTES + dropped * EVENT_BYTES, (events - dropped) * EVENT_BYTES);
        int kind = code(e.type);
        made.putLong(e.ts).put((byte) kind).putInt(hash(e.item_id.getBytes(StandardCharsets.UTF_8)))
            .putInt(hash(e.category.getBytes(StandardCharsets.UTF_8))).putFloat((float) e.price);
        made.putLong(carts ? 8 : 0, offset + 1).putInt(16, made.getInt(16) + 1);
        made.putInt(28 + 4 * kind, made.getInt(28 + 4 * kind) + 1);
        return made.array();
    }

    // ---- a row: the tensors of one window, and what its message needs ---------------------------------------------

    static final class Row {
        final byte[] key;
        final String user;
        final long asOfMs, seen, clicks, carts;
        final int bucket, slots;
        final int[] categories;
        final float[] numbers, counters;
        float intent, spend, churn;
        float[] tiers;
        volatile boolean done;

        Row(byte[] key, byte[] window, int countersWidth) {
            ByteBuffer in = ByteBuffer.wrap(window);
            int events = (window.length - HEAD_BYTES) / EVENT_BYTES;
            this.key = key;
            user = new String(key, StandardCharsets.UTF_8);
            clicks = in.getLong(0);
            carts = in.getLong(8);
            seen = in.getInt(16);
            long firstMs = in.getLong(20);
            asOfMs = in.getLong(HEAD_BYTES + (events - 1) * EVENT_BYTES);
            slots = Math.min(events, SLOTS_MAX);
            int b = 0;
            while (LENGTHS[b] < slots) b++;
            bucket = b;
            categories = new int[3 * slots];
            numbers = new float[SLOT_NUMBERS * slots];
            counters = new float[countersWidth];
            long before = 0;
            for (int slot = 0; slot < slots; slot++) {
                int at = HEAD_BYTES + (events - slots + slot) * EVENT_BYTES;
                long ts = in.getLong(at);
                categories[3 * slot] = in.get(at + 8);
                categories[3 * slot + 1] = in.getInt(at + 9) % 4095 + 1;
                categories[3 * slot + 2] = in.getInt(at + 13) % 1023 + 1;
                int n = SLOT_NUMBERS * slot;
                numbers[n] = (float) Math.log1p(in.getFloat(at + 17));
                numbers[n + 1] = slot == 0 ? 0 : (float) Math.log1p(Math.max(ts - before, 0) / 86_400_000.0);
                numbers[n + 2] = (float) Math.log1p(Math.max(asOfMs - ts, 0) / 86_400_000.0);
                double angle = ts % 86_400_000L * (2 * Math.PI / 86_400_000.0);
                numbers[n + 5] = (float) Math.sin(angle);
                numbers[n + 6] = (float) Math.cos(angle);
                before = ts;
            }
            for (int kind = 1; kind < 15; kind++) counters[kind - 1] = (float) Math.log1p(in.getInt(28 + 4 * kind));
            counters[14] = (float) Math.log1p(Math.max(asOfMs - firstMs, 0) / 86_400_000.0);
        }

        byte[] message(JsonFactory json, MessageDigest digest, String model, String version, String sha256)
                throws IOException {
            String identity = "[\"" + user + "\",\"scores.updated\",\"\",0," + clicks + "," + carts + "," + seen + ",\""
                + sha256 + "\"]";
            byte[] id = digest.digest(identity.getBytes(StandardCharsets.UTF_8));
            StringBuilder hex = new StringBuilder(32);
            for (byte part : id) hex.append(Character.forDigit(part >> 4 & 15, 16)).append(Character.forDigit(part & 15, 16));
            ByteArrayOutputStream out = new ByteArrayOutputStream(640);
            int tier = 0;
            double sum = 0, expected = 0;
            for (int i = 0; i < tiers.length; i++) {
                if (sum < 0.5) tier = i;
                sum += tiers[i];
                expected += i * tiers[i];
            }
            try (JsonGenerator to = json.createGenerator(out)) {
                to.writeStartObject();
                to.writeStringField("id", hex.toString());
                to.writeStringField("type", "scores.updated");
                to.writeStringField("user_id", user);
                to.writeNumberField("as_of_ms", asOfMs);
                to.writeNumberField("events_seen", seen);
                to.writeObjectFieldStart("cause");
                to.writeNumberField("clicks_offset", clicks);
                to.writeNumberField("carts_offset", carts);
                to.writeNullField("timer_ms");
                to.writeEndObject();
                to.writeObjectFieldStart("model");
                to.writeStringField("name", model);
                to.writeStringField("version", version);
                to.writeStringField("sha256", sha256);
                to.writeEndObject();
                to.writeObjectFieldStart("scores");
                to.writeNumberField("purchase_intent", grid(intent));
                to.writeNumberField("purchase_power", grid(expected / (tiers.length - 1)));
                to.writeNumberField("churn", grid(churn));
                to.writeNumberField("expected_spend_90d", Math.round(spend * 100) / 100.0);
                to.writeEndObject();
                to.writeArrayFieldStart("tier_probabilities");
                for (float share : tiers) to.writeNumber(grid(share));
                to.writeEndArray();
                to.writeNumberField("tier", tier);
                to.writeEndObject();
            }
            return out.toByteArray();
        }

        static double grid(double share) { return Math.round(share * 10_000) / 10_000.0; }
    }

    // ---- Triton: ModelInfer of KServe's protocol, written by hand as ours is ---------------------------------------

    static final MethodDescriptor.Marshaller<byte[]> BYTES = new MethodDescriptor.Marshaller<>() {
        @Override public InputStream stream(byte[] value) { return new ByteArrayInputStream(value); }

        @Override public byte[] parse(InputStream stream) {
            try {
                return stream.readAllBytes();
            } catch (IOException x) {
                throw new RuntimeException(x);
            }
        }
    };

    /** All rows of the process, and the requests that carry them. */
    static final class Caller {
        final String model, version;
        final String[] outputs;
        final int inFlightMax, countersWidth;
        final ManagedChannel channel;
        final MethodDescriptor<byte[], byte[]> infer = MethodDescriptor.<byte[], byte[]>newBuilder()
            .setType(MethodDescriptor.MethodType.UNARY).setFullMethodName("inference.GRPCInferenceService/ModelInfer")
            .setRequestMarshaller(BYTES).setResponseMarshaller(BYTES).build();
        final List<ArrayDeque<Row>> waiting = new ArrayList<>();
        int inFlight;

        Caller(String address, String model, String version, String[] outputs, int inFlightMax, int countersWidth) {
            this.model = model;
            this.version = version;
            this.outputs = outputs;
            this.inFlightMax = inFlightMax;
            this.countersWidth = countersWidth;
            channel = NettyChannelBuilder.forTarget("dns:///" + address).usePlaintext().directExecutor()
                .maxInboundMessageSize(64 << 20).build();
            for (int i = 0; i < LENGTHS.length; i++) waiting.add(new ArrayDeque<>());
        }

        void ask(Row row) {
            List<Row> rows = null;
            synchronized (this) {
                waiting.get(row.bucket).add(row);
                if (inFlight < inFlightMax) rows = next(row.bucket);
            }
            if (rows != null) send(rows);
        }

        void askAndWait(Row row) {
            read(ClientCalls.blockingUnaryCall(channel, infer, CallOptions.DEFAULT, request(List.of(row))), List.of(row));
        }

        private List<Row> next(int bucket) {
            ArrayDeque<Row> from = waiting.get(bucket);
            List<Row> rows = new ArrayList<>(Math.min(from.size(), ROWS_MAX));
            while (!from.isEmpty() && rows.size() < ROWS_MAX) rows.add(from.poll());
            inFlight++;
            return rows;
        }

        private void send(List<Row> rows) {
            ClientCalls.asyncUnaryCall(channel.newCall(infer, CallOptions.DEFAULT), request(rows), new StreamObserver<>() {
                @Override public void onNext(byte[] answer) { read(answer, rows); }

                @Override public void onError(Throwable error) {
                    error.printStackTrace();
                    Runtime.getRuntime().halt(3);
                }

                @Override public void onCompleted() {
                    List<Row> more = null;
                    synchronized (Caller.this) {
                        inFlight--;
                        int fullest = 0;
                        for (int i = 1; i < LENGTHS.length; i++)
                            if (waiting.get(i).size() > waiting.get(fullest).size()) fullest = i;
                        if (!waiting.get(fullest).isEmpty()) more = next(fullest);
                    }
                    if (more != null) send(more);
                }
            });
        }

        byte[] request(List<Row> rows) {
            int n = rows.size(), length = LENGTHS[rows.get(0).bucket];
            Wire out = new Wire(512 + n * (length * (12 + 4 * SLOT_NUMBERS) + 4 * countersWidth + 8));
            out.text(1, model).text(2, version);
            long[][] shapes = {{n, length, 3}, {n, length, SLOT_NUMBERS}, {n, countersWidth}, {n, 1}};
            for (int i = 0; i < INPUTS.length; i++) {
                Wire dims = new Wire(32);
                for (long dim : shapes[i]) dims.varint(dim);
                out.bytes(5, new Wire(96).text(1, INPUTS[i]).text(2, KINDS[i]).bytes(3, dims.done()).done());
            }
            for (String output : outputs) out.bytes(6, new Wire(64).text(1, output).done());
            ByteBuffer to = out.contents(7, n * length * 12);
            for (Row row : rows) {
                for (int value : row.categories) to.putInt(value);
                to.position(to.position() + 12 * (length - row.slots));
            }
            to = out.contents(7, n * length * 4 * SLOT_NUMBERS);
            for (Row row : rows) {
                for (float value : row.numbers) to.putFloat(value);
                to.position(to.position() + 4 * SLOT_NUMBERS * (length - row.slots));
            }
            to = out.contents(7, n * 4 * countersWidth);
            for (Row row : rows) for (float value : row.counters) to.putFloat(value);
            to = out.contents(7, n * 8);
            for (int i = 0; i < n; i++) to.putLong(i);
            return out.done();
        }

        /** The contents (field 6) come in the order of the output tensors (field 5), each with its name (field 1). */
        void read(byte[] answer, List<Row> rows) {
            ByteBuffer in = ByteBuffer.wrap(answer).order(ByteOrder.LITTLE_ENDIAN);
            List<String> names = new ArrayList<>();
            List<ByteBuffer> contents = new ArrayList<>();
            while (in.hasRemaining()) {
                long tag = Wire.varint(in);
                if ((tag & 7) == 0) {
                    Wire.varint(in);
                    continue;
                }
                int size = (int) Wire.varint(in);
                ByteBuffer part = in.slice(in.position(), size).order(ByteOrder.LITTLE_ENDIAN);
                in.position(in.position() + size);
                if (tag >> 3 == 5) {
                    Wire.varint(part);
                    byte[] name = new byte[(int) Wire.varint(part)];
                    part.get(name);
                    names.add(new String(name, StandardCharsets.UTF_8));
                } else if (tag >> 3 == 6) {
                    contents.add(part);
                }
            }
            int n = rows.size();
            for (int o = 0; o < names.size(); o++) {
                ByteBuffer values = contents.get(o);
                for (int i = 0; i < n; i++) {
                    Row row = rows.get(i);
                    switch (names.get(o)) {
                        case "purchase_intent" -> row.intent = values.getFloat();
                        case "expected_spend" -> row.spend = values.getFloat();
                        case "churn" -> row.churn = values.getFloat();
                        case "tier_probabilities" -> {
                            row.tiers = new float[values.limit() / 4 / n];
                            for (int k = 0; k < row.tiers.length; k++) row.tiers[k] = values.getFloat();
                        }
                        default -> { }
                    }
                }
            }
            for (Row row : rows) row.done = true;
        }
    }

    /** Protocol Buffers' encoding. */
    static final class Wire {
        private ByteBuffer to;

        Wire(int bytes) { to = ByteBuffer.allocate(bytes).order(ByteOrder.LITTLE_ENDIAN); }

        Wire varint(long value) {
            while (value > 127) {
                to.put((byte) (value & 127 | 128));
                value >>>= 7;
            }
            to.put((byte) value);
            return this;
        }

        static long varint(ByteBuffer in) {
            long value = 0;
            for (int shift = 0; ; shift += 7) {
                byte part = in.get();
                value |= (long) (part & 127) << shift;
                if (part >= 0) return value;
            }
        }

        Wire bytes(int field, byte[] value) {
            varint(field << 3 | 2).varint(value.length);
            to.put(value);
            return this;
        }

        Wire text(int field, String value) { return bytes(field, value.getBytes(StandardCharsets.UTF_8)); }

        ByteBuffer contents(int field, int bytes) {
            varint(field << 3 | 2).varint(bytes);
            ByteBuffer part = to.slice(to.position(), bytes).order(ByteOrder.LITTLE_ENDIAN);
            to.position(to.position() + bytes);
            return part;
        }

        byte[] done() { return java.util.Arrays.copyOf(to.array(), to.position()); }
    }

    // ---- the processor ---------------------------------------------------------------------------------------------

    static final class Scored implements Processor<byte[], byte[], byte[], byte[]> {
        private final Caller caller;
        private final boolean sync;
        private final int events;
        private final String sha256;
        private final ObjectMapper mapper = new ObjectMapper();
        private final JsonFactory json = new JsonFactory();
        private final MessageDigest digest;
        private final ArrayDeque<Row> asked = new ArrayDeque<>();
        private ProcessorContext<byte[], byte[]> context;
        private KeyValueStore<byte[], byte[]> store;

        Scored(Caller caller, boolean sync, int events, String sha256) {
            this.caller = caller;
            this.sync = sync;
            this.events = events;
            this.sha256 = sha256;
            try {
                digest = MessageDigest.getInstance("MD5");
            } catch (NoSuchAlgorithmException x) {
                throw new IllegalStateException(x);
            }
        }

        @Override public void init(ProcessorContext<byte[], byte[]> given) {
            context = given;
            store = given.getStateStore(Main.STORE);
            if (!sync) {
                context.schedule(Duration.ofMillis(1), PunctuationType.WALL_CLOCK_TIME, now -> forward());
            }
        }

        @Override public void process(Record<byte[], byte[]> record) {
            try {
                Main.Event event = mapper.readValue(record.value(), Main.Event.class);
                byte[] window = store.get(record.key());
                if (window == null) window = madeUp(record.key(), event.ts, events);
                var from = context.recordMetadata().orElseThrow();
                window = append(window, event, from.topic().equals(Main.CARTS), from.offset());
                store.put(record.key(), window);
                Row row = new Row(record.key(), window, caller.countersWidth);
                asked.add(row);
                if (sync) caller.askAndWait(row); else caller.ask(row);
            } catch (IOException x) {
                throw new RuntimeException(x);
            }
            forward();
        }

        private void forward() {
            while (!asked.isEmpty() && asked.peek().done) {
                Row row = asked.poll();
                try {
                    context.forward(new Record<>(row.key, row.message(json, digest, caller.model, caller.version, sha256),
                        row.asOfMs));
                } catch (IOException x) {
                    throw new RuntimeException(x);
                }
            }
        }
    }

    public static void main(String[] args) throws Exception {
        boolean triton = env("JOB", "window").equals("triton");
        Properties p = new Properties();
        p.put(StreamsConfig.APPLICATION_ID_CONFIG, env("APP_ID", "steady"));
        p.put(StreamsConfig.BOOTSTRAP_SERVERS_CONFIG, env("KAFKA", "127.0.0.1:19092"));
        p.put(StreamsConfig.STATE_DIR_CONFIG, env("STATE_DIR", System.getProperty("java.io.tmpdir")));
        p.put(StreamsConfig.NUM_STREAM_THREADS_CONFIG, env("THREADS", "1"));
        p.put(StreamsConfig.PROCESSING_GUARANTEE_CONFIG, StreamsConfig.AT_LEAST_ONCE);
        p.put(StreamsConfig.COMMIT_INTERVAL_MS_CONFIG, (long) (Double.parseDouble(env("COMMIT_S", "1")) * 1000));
        p.put(StreamsConfig.STATESTORE_CACHE_MAX_BYTES_CONFIG, env("CACHE_BYTES", "67108864"));
        p.put(StreamsConfig.REPLICATION_FACTOR_CONFIG, 1);
        p.put(StreamsConfig.POLL_MS_CONFIG, env("POLL_MS", "100"));
        p.put(StreamsConfig.producerPrefix(ProducerConfig.BATCH_SIZE_CONFIG), "262144");
        p.put(StreamsConfig.producerPrefix(ProducerConfig.LINGER_MS_CONFIG), env("LINGER_MS", "100"));
        p.put(StreamsConfig.consumerPrefix(ConsumerConfig.AUTO_OFFSET_RESET_CONFIG), "earliest");
        StoreBuilder<KeyValueStore<byte[], byte[]>> store = Stores.keyValueStoreBuilder(
            Stores.persistentKeyValueStore(Main.STORE), Serdes.ByteArray(), Serdes.ByteArray()).withCachingEnabled();
        ProcessorSupplier<byte[], byte[], byte[], byte[]> processor;
        if (triton) {
            Caller caller = new Caller(env("TRITON", ""), env("MODEL", "shopper"), env("VERSION", "1"),
                env("OUTPUTS", "").split(","), Integer.parseInt(env("IN_FLIGHT", "16")),
                Integer.parseInt(env("COUNTERS", "46")));
            boolean sync = env("MODE", "async").equals("sync");
            int events = Integer.parseInt(env("WINDOW", "22"));
            String sha256 = env("SHA256", "");
            processor = () -> new Scored(caller, sync, events, sha256);
        } else {
            processor = Main.Append::new;
        }
        Topology t = new Topology();
        t.addSource("in", Serdes.ByteArray().deserializer(), Serdes.ByteArray().deserializer(), Main.CLICKS, Main.CARTS)
            .addProcessor("append", processor, "in")
            .addStateStore(store, "append")
            .addSink("out", Main.UPDATES, Serdes.ByteArray().serializer(), Serdes.ByteArray().serializer(), "append");
        KafkaStreams streams = new KafkaStreams(t, p);
        CountDownLatch end = new CountDownLatch(1);
        streams.setUncaughtExceptionHandler(x -> {
            x.printStackTrace();
            return org.apache.kafka.streams.errors.StreamsUncaughtExceptionHandler.StreamThreadExceptionResponse.SHUTDOWN_CLIENT;
        });
        streams.setStateListener((to, from) -> {
            if (to == KafkaStreams.State.RUNNING) Main.say("running");
        });
        Runtime.getRuntime().addShutdownHook(new Thread(() -> {
            streams.close(Duration.ofSeconds(8));
            end.countDown();
        }));
        streams.start();
        end.await();
    }
}
