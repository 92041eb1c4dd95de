template <typename T> void numbers(T block, T low, T high, T seed, T& first, T& second) {
    unsigned long long counter = SIGNS ? block >> 5 : block;
    unsigned int c0 = counter, c1 = counter >> 32, c2 = low, c3 = high;
    unsigned int k0 = seed, k1 = (unsigned long long)seed >> 32;
    for (int round = 0; round < 10; ++round) {
        unsigned long long p0 = (unsigned long long)c0 * 0xD2511F53u;
        unsigned long long p1 = (unsigned long long)c2 * 0xCD9E8D57u;
        c0 = (unsigned int)(p1 >> 32) ^ c1 ^ k0;
        c2 = (unsigned int)(p0 >> 32) ^ c3 ^ k1;
        c1 = (unsigned int)p1;
        c3 = (unsigned int)p0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    union { unsigned int word[4]; float number[4]; T pair[2]; } out = {{c0, c1, c2, c3}};
    for (int i = 0; GAUSSIAN && i < 4; i += 2) {
        float radius = (float)(out.word[i] + 1ull) * 2.3283064365386963e-10f;
        radius = sqrtf(logf(radius) * -2.0f);
        float angle = (float)out.word[i + 1] * 1.4629180792671596e-09f;
        out.number[i] = radius * cosf(angle);
        out.number[i + 1] = radius * sinf(angle);
    }
    unsigned int bits = out.word[(block & 31) >> 3] >> 4 * (block & 7);
    for (int i = 0; SIGNS && i < 4; ++i)
        out.number[i] = bits >> i & 1 ? 1.0f : -1.0f;
    first = out.pair[0];
    second = out.pair[1];
}
