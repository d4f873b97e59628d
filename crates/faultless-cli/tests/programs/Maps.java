import java.io.File;
import java.io.RandomAccessFile;
import java.nio.MappedByteBuffer;
import java.nio.channels.FileChannel;
import java.util.Random;
import java.util.concurrent.atomic.AtomicBoolean;

/** 16 threads read a mapped file at random while the heap is busy; null pointers and a truncated file are exceptions. */
public class Maps {
    static volatile Object sink;

    public static void main(String[] args) throws Exception {
        FileChannel channel = new RandomAccessFile(args[0], "r").getChannel();
        MappedByteBuffer map = channel.map(FileChannel.MapMode.READ_ONLY, 0, channel.size());
        int pages = map.capacity() / 4096;
        long[] sums = new long[16];
        Thread[] threads = new Thread[16];
        AtomicBoolean stop = new AtomicBoolean();
        Thread garbage = new Thread(() -> {
            while (!stop.get()) sink = new byte[100_000];
        });
        garbage.start();
        for (int i = 0; i < threads.length; i++) {
            int k = i;
            threads[i] = new Thread(() -> {
                Random random = new Random(k);
                String none = null;
                long sum = 0;
                for (int j = 0; j < 2000; j++) {
                    sum += map.getLong(random.nextInt(pages) * 4096);
                    sink = new byte[2000];
                    // A SIGSEGV of the virtual machine's own.
                    if (j % 500 == 0) {
                        try {
                            sum += none.length();
                        } catch (NullPointerException e) {
                            sum += 1;
                        }
                    }
                }
                sums[k] = sum;
            });
            threads[i].start();
        }
        for (Thread t : threads) t.join();
        stop.set(true);
        garbage.join();
        long all = 0;
        for (long s : sums) all = all * 31 + s;
        System.out.println(all);
        // A SIGBUS of the virtual machine's own.
        File file = new File(args[1]);
        try (RandomAccessFile w = new RandomAccessFile(file, "rw")) {
            w.setLength(8 << 20);
        }
        MappedByteBuffer shrinking = new RandomAccessFile(file, "r").getChannel().map(FileChannel.MapMode.READ_ONLY, 0, 8 << 20);
        long zero = shrinking.getLong(4 << 20);
        try (RandomAccessFile w = new RandomAccessFile(file, "rw")) {
            w.setLength(1 << 20);
        }
        try {
            System.out.println("no error, " + (zero + shrinking.getLong(4 << 20)));
        } catch (InternalError e) {
            System.out.println("InternalError");
        }
    }
}
